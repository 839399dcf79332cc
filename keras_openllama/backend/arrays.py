"""Conversion of tensors of any backend to NumPy arrays.

TensorFlow is never imported for it: a process that has a TensorFlow tensor has already
imported TensorFlow.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import keras
import ml_dtypes
import numpy as np

from keras_openllama.utils.types import Tensor


def as_numpy(value: Tensor) -> np.ndarray:
    """Returns a tensor of the backend as a NumPy array; on a CPU mostly without a copy.

    Args:
        value: Tensor of JAX, TensorFlow or PyTorch, on any devices.

    Returns:
        Array of the same shape and dtype.

    Raises:
        ValueError: If parts of the tensor are on other hosts.

    Example:
        >>> as_numpy(keras.ops.arange(3))
        array([0, 1, 2], dtype=int32)
    """
    backend = {"jax": _from_jax, "torch": _from_torch}
    return backend.get(keras.config.backend(), np.asarray)(value)


def _from_jax(value):
    import jax

    if not value.is_fully_addressable:
        raise ValueError(
            "it is sharded over several hosts, so that no host can write it: save a "
            "checkpoint, and convert that"
        )
    if len(value.devices()) == 1 and next(iter(value.devices())).platform == "cpu":
        return np.asarray(value)
    # A JAX array caches the NumPy array made of it. Short-lived copies of its shards
    # avoid that.
    result = np.empty(value.shape, value.dtype)
    for shard in value.addressable_shards:
        if shard.replica_id == 0:
            result[shard.index] = np.asarray(jax.numpy.array(shard.data, copy=True))
    return result


def _from_torch(value):
    import torch

    value = value.detach().cpu()
    if value.dtype != torch.bfloat16:
        return value.numpy()
    # PyTorch cannot convert bfloat16 to NumPy.
    return value.view(torch.int16).numpy().view(ml_dtypes.bfloat16)


def tensor_on_memory(array: np.ndarray, like: Tensor | None = None) -> Tensor:
    """Returns a tensor of JAX or PyTorch on a CPU that has the memory of an array.

    The array must not be written to afterwards. PyTorch writes to it if the tensor is
    changed in place; JAX does not.

    Args:
        array: Writable array, aligned to 64 bytes; JAX copies others.
        like: Tensor whose devices the result has; `None` for the default ones.

    Returns:
        Tensor with the shape and dtype of the array.

    Example:
        >>> tensor_on_memory(np.arange(3)).shape
        (3,)
    """
    if keras.config.backend() == "jax":
        import jax

        # Else a program that has been compiled for `like` would be compiled again.
        committed = like is not None and like.committed
        return jax.device_put(array, like.sharding if committed else None)
    import torch

    if array.dtype != ml_dtypes.bfloat16:
        return torch.from_numpy(array)
    return torch.from_numpy(array.view("int16")).view(torch.bfloat16)


def loaded_tensorflow() -> ModuleType | None:
    """Returns the `tensorflow` module if the process has imported it, else `None`."""
    return sys.modules.get("tensorflow")


def is_graph_tensor(value: Any) -> bool:
    """Whether `value` is a symbolic TensorFlow tensor, as in `Dataset.map`."""
    tensorflow = loaded_tensorflow()
    return tensorflow is not None and tensorflow.is_symbolic_tensor(value)


def to_numpy(value: Any) -> np.ndarray:
    """Returns an array-like, or a tensor of any backend, as a NumPy array.

    Args:
        value: Array, list of numbers, or tensor of JAX, TensorFlow or PyTorch, on any
            device.

    Returns:
        Array of the same shape and dtype.

    Example:
        >>> to_numpy([1, 2])
        array([1, 2])
    """
    if hasattr(
        value, "detach"
    ):  # NumPy converts neither tensors with gradients nor GPU memory.
        value = value.detach().cpu()
    return np.asarray(value)
