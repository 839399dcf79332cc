"""Where the state of generation and of scoring lives: on one device, or over a mesh."""

import math

import keras
import numpy as np
from keras import ops

from keras_openllama.backend.keras_private import stored_value
from keras_openllama.distribution import BATCH_AXES

if keras.config.backend() == "jax":
    import jax
    from jax.sharding import NamedSharding, PartitionSpec


def to_device(array, sharding=None):
    """A NumPy array as a tensor on the device.

    Args:
        array: NumPy array.
        sharding: `jax.sharding.Sharding`; `None` is the default device.
    """
    if keras.config.backend() == "jax":
        # `ops.convert_to_tensor` compiles a program for each new shape.
        return jax.device_put(array, sharding)
    return ops.convert_to_tensor(array)


def sharded_zeros(shape, dtype, backbone):
    """Zeros on the devices of a model, sharded as its cache is (JAX).

    On a CPU they come from NumPy, since others are one more program to compile. To an
    accelerator they would be copied in each call, hundreds of megabytes of them.
    """
    sharding = state_shardings(backbone)[0]
    if device_platform(backbone) == "cpu":
        return to_device(np.zeros(shape, jax.numpy.dtype(dtype)), sharding)
    return jax.numpy.zeros(shape, dtype, device=sharding)


def device_platform(backbone):
    """The platform of the devices that hold the weights, such as `"cpu"` (JAX)."""
    return next(iter(_key_kernel(backbone).devices())).platform


def state_shardings(backbone):
    """How a distribution of the weights wants the state of generation.

    What belongs to heads is sharded as the keys' projection is; all else is everywhere.

    Args:
        backbone: `OpenLlamaBackbone`.

    Returns:
        A pair of shardings, for the cache and for the rest; `None` twice where the
        weights are not distributed.
    """
    layout = _key_layout(backbone)
    if layout is None:
        return None, None
    mesh, axis = layout.mesh, (*layout.spec, None)[0]
    names = axis if isinstance(axis, tuple) else (axis,) if axis else ()
    shards = math.prod(mesh.shape[name] for name in names)
    if backbone.num_key_value_heads % shards:
        axis = None  # Fewer heads than devices: each device has them all.
    return NamedSharding(mesh, PartitionSpec(axis)), NamedSharding(
        mesh, PartitionSpec()
    )


def batch_sharding(backbone):
    """How a distribution of the weights wants the rows of a batch.

    Args:
        backbone: `OpenLlamaBackbone`.

    Returns:
        A pair: the sharding of arrays whose first axis is that of rows, `None` where
        the weights are not distributed; and int, what their number is a multiple of.
    """
    layout = _key_layout(backbone)
    if layout is None:
        return None, 1
    mesh = layout.mesh
    # Ours, and what KerasHub's models name it.
    axes = tuple(name for name in mesh.axis_names if name in (*BATCH_AXES, "batch"))
    shards = math.prod(mesh.shape[name] for name in axes)
    return NamedSharding(mesh, PartitionSpec(axes or None)), shards


def _key_layout(backbone):
    """The `NamedSharding` of the keys' projection; `None` where nothing has one."""
    layout = getattr(_key_kernel(backbone), "sharding", None)
    if keras.config.backend() == "jax" and isinstance(layout, NamedSharding):
        return layout
    return None


def _key_kernel(backbone):
    """The tensor of the keys' projection in the first layer."""
    key = backbone.transformer_layers[0].self_attention.key
    return stored_value(key.variables[0])


def constrain_sharding(tensors, sharding):
    """Fixes the sharding of tensors inside a program, so that calls agree on it."""
    if sharding is None:
        return tensors
    return jax.lax.with_sharding_constraint(tensors, sharding)
