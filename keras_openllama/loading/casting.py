"""From an array on a mapped file to a tensor of the backend: cast and placed.

The source is read where it lies, and what comes out is the only copy. NumPy casts
float16 on one core and slowly, so large tensors are cast by the backend, whose
operations use all cores.
"""

import functools

import keras
import numpy as np

from keras_openllama.backend.keras_private import torch_device, torch_dtype
from keras_openllama.checkpoints.array_io import check_range, contiguous
from keras_openllama.checkpoints.tensors import numpy_dtype
from keras_openllama.loading.uninitialized import layout_of

# Below this NumPy is done before the backend has compiled anything.
_SMALL = 4 << 20


def value_for(variable, array):
    """The value of a variable, from an array in a file.

    Args:
        variable: a `keras.Variable` without a value, see
            `uninitialized.without_weights`.
        array: NumPy array of the variable's shape. It may lie on a mapped file; the
            result never does.

    Returns:
        A tensor of the backend, of the variable's shape and dtype, on its device; on
        JAX, sharded as the distribution says.

    Raises:
        ValueError: if the variable is float16 and a value is beyond its range.
    """
    dtype = variable.dtype
    if dtype == "float16" and array.dtype != np.float16:
        check_range(array, np.float16)
    array = contiguous(array)
    if not array.flags.aligned:
        array = array.copy()
    convert = {"jax": _jax, "tensorflow": _tensorflow, "torch": _torch}
    return convert[keras.config.backend()](variable, array, dtype)


def _numpy(array, dtype):
    return np.array(array, dtype=numpy_dtype(dtype), order="C")


def _jax(variable, array, dtype):
    import jax

    layout = layout_of(variable)
    if layout is None:
        value = _jax_cast(array, dtype)
        if value.devices() == _default_devices():
            return value
        return jax.device_put(np.asarray(value))

    shards = {}  # Devices that hold the same part share its cast.

    def shard(index):
        key = str(index)
        if key not in shards:
            shards[key] = np.asarray(_jax_cast(array[index], dtype))
        return shards[key]

    return jax.make_array_from_callback(tuple(variable.shape), layout, shard)


def _default_devices():
    """Where JAX puts an array, `keras.device` counted in."""
    import jax

    return jax.numpy.zeros(()).devices()


def _jax_cast(array, dtype):
    """Casts in the host's memory, so that an accelerator only sees the result."""
    import jax

    same = array.dtype == numpy_dtype(dtype)
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        if same or array.nbytes <= _SMALL:
            # A copy in any case: `jax.jit` would hand the file's own pages on.
            return jax.numpy.asarray(_numpy(array, dtype))
        return _jitted_cast()(array, dtype).block_until_ready()


@functools.cache
def _jitted_cast():
    import jax

    return jax.jit(lambda array, dtype: array.astype(dtype), static_argnums=1)


def _tensorflow(variable, array, dtype):
    import tensorflow as tf

    same = array.dtype == numpy_dtype(dtype)
    if same or array.nbytes <= _SMALL:
        return tf.convert_to_tensor(_numpy(array, dtype))
    return tf.cast(tf.convert_to_tensor(array), dtype)


def _torch(variable, array, dtype):
    import torch

    bits = array.view(np.int16) if array.dtype == numpy_dtype("bfloat16") else array
    # `torch.from_numpy` would warn that the array may not be written to.
    source = torch.from_dlpack(bits)
    if bits is not array:
        source = source.view(torch.bfloat16)
    dtype = torch_dtype(dtype)
    value = torch.empty(source.shape, dtype=dtype, device=torch_device())
    return value.copy_(source)
