"""Texts and ids as users hold them, made into Python lists.

KerasHub's users pass strings, bytes, lists, NumPy arrays and tensors of any of the
backends. TensorFlow is never imported for it: only who has imported it can hold one
of its tensors.
"""

import sys

import numpy as np


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


def as_texts(inputs, name="inputs"):
    """Returns `inputs` as a list of strings, and whether they were a batch.

    Args:
        inputs: a string, UTF-8 bytes, or a list, tuple, array or TensorFlow tensor of
            them with at most one dimension.
        name: what to call the argument in error messages.

    Returns:
        `(texts, batched)`: list of str; bool, false if `inputs` was one text.

    Raises:
        ValueError: if something is not text, or not valid UTF-8.
    """
    if isinstance(inputs, (str, bytes)):
        return [_as_text(inputs, name)], False
    if hasattr(inputs, "dtype"):
        array = to_numpy(inputs)
        if array.ndim > 1:
            raise ValueError(
                f"`{name}` must be one text or a flat batch of texts. "
                f"Received an array of shape {array.shape}."
            )
        if array.ndim == 0:
            return [_as_text(array.item(), name)], False
        inputs = array.tolist()
    if not isinstance(inputs, (list, tuple)):
        raise ValueError(
            f"`{name}` must be a string, or a list or array of strings. "
            f"Received: {inputs!r} of type {type(inputs).__name__}."
        )
    return [_as_text(text, f"{name}[{i}]") for i, text in enumerate(inputs)], True


def _as_text(text, name):
    if hasattr(text, "dtype"):  # A list of 0-dimensional string tensors.
        text = to_numpy(text)
        text = text.item() if text.ndim == 0 else text
    try:
        if isinstance(text, bytes):
            return text.decode()
        if isinstance(text, str):
            text.encode()  # A lone surrogate is no character and has no UTF-8.
            return text
    except UnicodeError as error:
        raise ValueError(
            f"`{name}` is not valid Unicode text: {error}. Decode it with the right "
            'encoding first, or with `errors="replace"`.'
        ) from error
    raise ValueError(
        f"`{name}` must be a string. Received: {text!r} of type {type(text).__name__}."
    )


def as_id_rows(ids, vocabulary_size):
    """Returns token ids as a list of lists of int, and whether they were a batch.

    Args:
        ids: an int, a list of ints, a list of lists of any lengths, or an integer
            array or tensor with at most two dimensions.
        vocabulary_size: int; ids are 0 to `vocabulary_size - 1`.

    Returns:
        `(rows, batched)`: list of lists of int; bool, true if `ids` had rows.

    Raises:
        ValueError: if something is not an integer, or not in the vocabulary.
    """
    tensorflow = loaded_tensorflow()
    if tensorflow is not None and isinstance(ids, tensorflow.RaggedTensor):
        ids = ids.to_list()
    if isinstance(ids, (list, tuple)):
        batched = any(np.ndim(row) > 0 for row in ids)
        rows = ids if batched else [ids]
    else:
        array = to_numpy(ids)
        if array.ndim > 2:
            raise ValueError(
                "`ids` must have at most two dimensions, (batch, length). "
                f"Received an array of shape {array.shape}."
            )
        batched = array.ndim == 2
        rows = array if batched else [array.reshape(-1)]
    return [_as_id_row(row, vocabulary_size) for row in rows], batched


def _as_id_row(row, vocabulary_size):
    array = to_numpy(row)
    if array.size == 0:
        return []
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise ValueError(
            "`ids` must be integers, in one list per text. "
            f"Received: {row!r} of type {type(row).__name__}."
        )
    for bad in (array.min(), array.max()):
        if not 0 <= bad < vocabulary_size:
            raise ValueError(
                f"`ids` holds {bad}, which is not in the vocabulary: its size is "
                f"{vocabulary_size}, so ids are 0 to {vocabulary_size - 1}."
            )
    return array.tolist()
