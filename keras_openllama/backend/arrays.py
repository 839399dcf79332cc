"""Arrays and tensors of any backend as NumPy arrays.

TensorFlow is never imported for it: only who has imported it can hold one of its
tensors.
"""

import sys

import keras
import ml_dtypes
import numpy as np


def as_numpy(value):
    """A tensor of the backend as a NumPy array; on a CPU mostly no copy.

    Args:
        value: tensor of JAX, TensorFlow or PyTorch, on whatever devices.

    Raises:
        ValueError: if other hosts have a part of it.
    """
    backend = {"jax": _from_jax, "torch": _from_torch}
    return backend.get(keras.config.backend(), np.asarray)(value)


def _from_jax(value):
    import jax

    if not value.is_fully_addressable:
        raise ValueError(
            "it is spread over several hosts, and one alone cannot write it: save a "
            "checkpoint, and convert that"
        )
    if len(value.devices()) == 1 and next(iter(value.devices())).platform == "cpu":
        return np.asarray(value)
    # An array keeps the NumPy array that was made of it, for as long as it lives. So
    # copies of its parts are asked, which live a moment.
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
    # PyTorch cannot give it to NumPy.
    return value.view(torch.int16).numpy().view(ml_dtypes.bfloat16)


def loaded_tensorflow():
    """Returns the `tensorflow` module if the process has imported it, else `None`."""
    return sys.modules.get("tensorflow")


def is_graph_tensor(value):
    """Whether `value` is a TensorFlow tensor without a value, as in `Dataset.map`."""
    tensorflow = loaded_tensorflow()
    return tensorflow is not None and tensorflow.is_symbolic_tensor(value)


def to_numpy(value):
    """Returns an array-like or a tensor of any backend as a NumPy array.

    Args:
        value: array, list of numbers, or tensor of JAX, TensorFlow or PyTorch, on
            whatever device.

    Returns:
        A NumPy array of the same shape and dtype.
    """
    if hasattr(value, "detach"):  # PyTorch converts neither gradients nor GPU memory.
        value = value.detach().cpu()
    return np.asarray(value)
