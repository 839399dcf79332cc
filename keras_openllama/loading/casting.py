"""Converts tensors of memory-mapped files to tensors of the backend.

Where possible, a tensor of the backend has the mapped memory itself. Otherwise the file
is read, cast and sharded, and the result is the only copy. NumPy casts float16 slowly
and on one core, so the backend, which uses all cores, casts large arrays.
"""

import functools

import keras
import numpy as np
from numpy.typing import NDArray

from keras_openllama.backend.arrays import tensor_on_memory
from keras_openllama.backend.keras_private import torch_device, torch_dtype
from keras_openllama.checkpoints.array_io import check_range, contiguous
from keras_openllama.checkpoints.tensors import (
    MappedTensor,
    StoredTensor,
    numpy_dtype,
)
from keras_openllama.loading.uninitialized import layout_of
from keras_openllama.utils.types import Tensor

# In bytes. NumPy casts smaller arrays in less time than the backend compiles a cast.
_SMALL = 4 << 20
# In bytes. With less, JAX copies arrays, and PyTorch decodes 8 % slower.
_ALIGNMENT = 64


def can_map_weights() -> bool:
    """Returns whether variables are created on one CPU, with JAX or PyTorch."""
    backend = keras.config.backend()
    if backend == "torch":
        return torch_device() == "cpu"
    if backend != "jax" or keras.distribution.distribution() is not None:
        return False
    return {device.platform for device in _default_devices()} == {"cpu"}


def can_share_memory(stored: StoredTensor, dtype: str) -> bool:
    """Returns whether the bytes of a tensor in a file can be those of a variable.

    Args:
        stored: Tensor of a checkpoint.
        dtype: Dtype of the variable.
    """
    return (
        isinstance(stored, MappedTensor)
        and stored.dtype == dtype
        and stored.is_contiguous
        and stored.nbytes > 0
        and stored.offset % _ALIGNMENT == 0
        and stored.file.can_be_shared
    )


def shared_value(stored: MappedTensor) -> Tensor:
    """Returns a tensor of a checkpoint as a value of a variable, without reading it.

    The value has the memory of the mapped file. Training changes it in memory only.

    Args:
        stored: Tensor for which `can_share_memory` holds, as `can_map_weights` does.

    Returns:
        Tensor of the backend.
    """
    return tensor_on_memory(stored.shared_array())


def value_for(variable: keras.Variable, array: NDArray) -> Tensor:
    """Converts an array of a checkpoint to the value of a variable.

    Args:
        variable: Variable without a value, see `uninitialized.without_weights`.
        array: Array of the variable's shape. It may share the memory of a mapped file;
            the result does not.

    Returns:
        Tensor of the backend with the variable's shape and dtype, on its device. On JAX
        it has the sharding of `keras.distribution`.

    Raises:
        ValueError: If the variable is float16 and a value exceeds its range.

    Example:
        >>> from keras_openllama.loading.uninitialized import without_weights
        >>> with without_weights():
        ...     variable = keras.Variable("zeros", shape=(2,), dtype="float16")
        >>> value_for(variable, np.ones(2, "float32")).dtype
        dtype('float16')
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

    shards = {}  # Devices with the same shard share its cast.

    def shard(index):
        key = str(index)
        if key not in shards:
            shards[key] = np.asarray(_jax_cast(array[index], dtype))
        return shards[key]

    return jax.make_array_from_callback(tuple(variable.shape), layout, shard)


def _default_devices():
    """Returns the devices on which JAX creates an array, which `keras.device` sets."""
    import jax

    return jax.device_put(np.zeros(())).devices()


def _jax_cast(array, dtype):
    """Casts in the memory of the host, so that only the result is transferred."""
    import jax

    same = array.dtype == numpy_dtype(dtype)
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        if same or array.nbytes <= _SMALL:
            # Always copied: `jax.jit` would return an array on the pages of the file.
            # `jax.numpy.asarray` would compile a program for each shape.
            return jax.device_put(_numpy(array, dtype))
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
    # `torch.from_numpy` would warn that the array is read-only.
    source = torch.from_dlpack(bits)
    if bits is not array:
        source = source.view(torch.bfloat16)
    dtype = torch_dtype(dtype)
    value = torch.empty(source.shape, dtype=dtype, device=torch_device())
    return value.copy_(source)
