"""Token ids and masks that a user passes, checked, and rows of ids as arrays."""

import numpy as np

from keras_openllama.backend.arrays import loaded_tensorflow, to_numpy

PAD_TOKEN_ID = 0  # OpenLLaMA has no pad token; 0 stands in, behind a mask.


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


def as_token_ids(token_ids, vocabulary_size, name="token_ids"):
    """Token ids as an int32 array `(batch, length)`.

    Raises:
        ValueError: for another rank, for what is no integer, or for ids outside the
            vocabulary (which backends would clamp or turn into NaN).
    """
    ids = to_numpy(token_ids)
    if ids.ndim != 2 or 0 in ids.shape:
        raise ValueError(
            f"`{name}` must have the shape (batch, length), neither of them 0. "
            f"Received: shape {ids.shape}"
        )
    if ids.dtype.kind not in "iu":
        raise ValueError(f"`{name}` must be integers. Received: dtype {ids.dtype}")
    outside = ids[(ids < 0) | (ids >= vocabulary_size)]
    if outside.size:
        raise ValueError(
            f"`{name}` must be from 0 to {vocabulary_size - 1}, the vocabulary of this "
            f"model. Received: {sorted(set(outside.tolist()))[:5]}; is the tokenizer "
            "that of the model?"
        )
    return ids.astype("int32")


def as_padding_mask(padding_mask, shape):
    """A padding mask as a bool array of `shape`; `None` stands for no padding.

    Raises:
        ValueError: for another shape.
    """
    if padding_mask is None:
        return np.ones(shape, "bool")
    mask = to_numpy(padding_mask).astype("bool")
    if mask.shape != shape:
        raise ValueError(
            f"`padding_mask` must have the shape of `token_ids`, {shape}. "
            f"Received: shape {mask.shape}"
        )
    return mask


def unpadded_ids(inputs, vocabulary_size):
    """The prompts in a dict of arrays, as lists of ids, and the width of the arrays.

    Raises:
        ValueError: for missing keys, wrong shapes or ids, a row without a token, or
            padding elsewhere than on the right.
    """
    if not isinstance(inputs, dict) or "token_ids" not in inputs:
        raise ValueError(
            'without text, `inputs` must be a dict of "token_ids" and "padding_mask". '
            f"Received: {type(inputs).__name__}"
            + (f" with keys {sorted(inputs)}" if isinstance(inputs, dict) else "")
        )
    ids = as_token_ids(inputs["token_ids"], vocabulary_size)
    mask = as_padding_mask(inputs.get("padding_mask"), ids.shape)
    lengths = mask.sum(axis=1)
    if not lengths.all():
        raise ValueError(
            "each row of `token_ids` needs at least one real token to continue. "
            f"`padding_mask` has none in rows {np.flatnonzero(lengths == 0).tolist()}"
        )
    for row, length in enumerate(lengths):
        if not mask[row, :length].all():
            raise ValueError(
                "`padding_mask` must have its padding on the right: all real tokens "
                f"first. Received: row {row} is {mask[row].astype(int).tolist()}"
            )
    rows = [row[:length].tolist() for row, length in zip(ids, lengths, strict=True)]
    return rows, ids.shape[1]


def as_arrays(rows, width):
    """Rows of ids as KerasHub's dict of arrays, filled up on the right.

    Args:
        rows: list of lists of int.
        width: int, length of the arrays.

    Returns:
        Dict of `"token_ids"`, int32, and `"padding_mask"`, bool, NumPy arrays
        `(batch, width)`.
    """
    token_ids = np.full((len(rows), width), PAD_TOKEN_ID, "int32")
    padding_mask = np.zeros((len(rows), width), "bool")
    for i, row in enumerate(rows):
        token_ids[i, : len(row)] = row
        padding_mask[i, : len(row)] = True
    return {"token_ids": token_ids, "padding_mask": padding_mask}
