"""Placement of generation and scoring state: on one device, or sharded over a mesh."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import keras
import numpy as np
from keras import ops

from keras_openllama.backend.keras_private import stored_value
from keras_openllama.distribution import BATCH_AXES
from keras_openllama.utils.types import Tensor

if keras.config.backend() == "jax":
    import jax
    from jax.sharding import NamedSharding, PartitionSpec

if TYPE_CHECKING:
    from jax.sharding import Sharding

    from keras_openllama.backend.keras_hub import Backbone


def to_device(array: np.ndarray, sharding: Sharding | None = None) -> Tensor:
    """Copies a NumPy array to the device.

    Args:
        array: NumPy array or scalar.
        sharding: sharding on JAX; `None` is the default device.

    Returns:
        A tensor of the backend.

    Example:
        >>> to_device(np.int32(5))
        Array(5, dtype=int32)
    """
    if keras.config.backend() == "jax":
        # `ops.convert_to_tensor` compiles a program for each new shape.
        return jax.device_put(array, sharding)
    return ops.convert_to_tensor(array)


def sharded_zeros(shape: Sequence[int], dtype: str, backbone: Backbone) -> Tensor:
    """Creates zeros with the sharding of a model's KV cache (JAX).

    On a CPU they are copied from NumPy, which saves a compilation. On an accelerator
    they are created on the device, since copying hundreds of megabytes in each call
    would take longer.

    Args:
        shape: shape of the array.
        dtype: dtype of the array.
        backbone: `OpenLlamaBackbone`.

    Returns:
        An array on the devices of the model.

    Example:
        >>> sharded_zeros((2, 4), "bfloat16", lm.backbone).dtype
        dtype(bfloat16)
    """
    sharding = state_shardings(backbone)[0]
    if device_platform(backbone) == "cpu":
        return to_device(np.zeros(shape, jax.numpy.dtype(dtype)), sharding)
    return jax.numpy.zeros(shape, dtype, device=sharding)


def device_platform(backbone: Backbone) -> str:
    """Returns the platform of the devices that hold the weights (JAX).

    Args:
        backbone: `OpenLlamaBackbone`.

    Returns:
        `"cpu"`, `"gpu"` or `"tpu"`.

    Example:
        >>> device_platform(lm.backbone)
        'cpu'
    """
    return model_device(backbone).platform


def model_device(backbone: Backbone) -> jax.Device:
    """Returns one of the devices that hold the weights (JAX).

    Args:
        backbone: `OpenLlamaBackbone`.

    Returns:
        A device.

    Example:
        >>> model_device(lm.backbone).platform
        'cpu'
    """
    return next(iter(_key_kernel(backbone).devices()))


def runs_on_one_cpu(backbone: Backbone) -> bool:
    """Returns whether the weights are on a CPU, and not distributed.

    Args:
        backbone: `OpenLlamaBackbone`.

    Example:
        >>> runs_on_one_cpu(lm.backbone)
        True
    """
    backend, kernel = keras.config.backend(), _key_kernel(backbone)
    if backend == "jax":
        is_distributed = state_shardings(backbone)[0] is not None
        return device_platform(backbone) == "cpu" and not is_distributed
    if backend == "torch":
        return kernel.device.type == "cpu"
    return ":CPU:" in kernel.device


def state_shardings(
    backbone: Backbone,
) -> tuple[Sharding | None, Sharding | None]:
    """Derives the shardings of generation state from those of the weights.

    The KV cache is sharded by heads, like the key projection; all other state is
    replicated.

    Args:
        backbone: `OpenLlamaBackbone`.

    Returns:
        The shardings of the cache and of the other state; twice `None` if the weights
        are not distributed.

    Example:
        >>> state_shardings(lm.backbone)
        (None, None)
    """
    layout = _key_layout(backbone)
    if layout is None:
        return None, None
    mesh, axis = layout.mesh, (*layout.spec, None)[0]
    names = axis if isinstance(axis, tuple) else (axis,) if axis else ()
    shards = math.prod(mesh.shape[name] for name in names)
    if backbone.num_key_value_heads % shards:
        axis = None  # Fewer heads than devices: each device has all of them.
    return NamedSharding(mesh, PartitionSpec(axis)), NamedSharding(
        mesh, PartitionSpec()
    )


def batch_sharding(backbone: Backbone) -> tuple[Sharding | None, int]:
    """Derives the sharding of a batch from the sharding of the weights.

    Args:
        backbone: `OpenLlamaBackbone`.

    Returns:
        The sharding of arrays whose first axis is the batch, or `None` if the weights
        are not distributed; and the number that must divide the batch size.

    Example:
        >>> batch_sharding(lm.backbone)
        (None, 1)
    """
    layout = _key_layout(backbone)
    if layout is None:
        return None, 1
    mesh = layout.mesh
    # Our batch axes, and the name that KerasHub's models use.
    axes = tuple(name for name in mesh.axis_names if name in (*BATCH_AXES, "batch"))
    shards = math.prod(mesh.shape[name] for name in axes)
    return NamedSharding(mesh, PartitionSpec(axes or None)), shards


def _key_layout(backbone: Backbone) -> NamedSharding | None:
    """Returns the sharding of the key projection, or `None` without distribution."""
    layout = getattr(_key_kernel(backbone), "sharding", None)
    if keras.config.backend() == "jax" and isinstance(layout, NamedSharding):
        return layout
    return None


def _key_kernel(backbone: Backbone) -> Tensor:
    """Returns the kernel of the key projection of the first layer."""
    key = backbone.transformer_layers[0].self_attention.key
    return stored_value(key.variables[0])


def constrain_sharding(tensors: Any, sharding: Sharding | None) -> Any:
    """Fixes the sharding of tensors inside a compiled program.

    Args:
        tensors: nested tensors.
        sharding: their sharding; `None` returns them unchanged.

    Returns:
        The tensors with this sharding.
    """
    if sharding is None:
        return tensors
    return jax.lax.with_sharding_constraint(tensors, sharding)
