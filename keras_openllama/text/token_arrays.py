"""Validation of token ids and padding masks, and padding of sequences to arrays."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from keras_openllama.backend.arrays import loaded_tensorflow, to_numpy

PAD_TOKEN_ID = 0  # OpenLLaMA has no pad token. 0 is used instead, and masked.


def as_id_sequences(ids: Any, vocabulary_size: int) -> tuple[list[list[int]], bool]:
    """Converts token ids to lists of ints.

    Args:
        ids: an int, a list of ints, a list of lists of any lengths, or an integer array
            or tensor with at most two dimensions.
        vocabulary_size: number of token ids; valid ids are 0 to `vocabulary_size - 1`.

    Returns:
        `(sequences, batched)`: the ids, and whether `ids` was a batch of sequences.

    Raises:
        ValueError: if an id is not an integer, or not in the vocabulary.

    Example:
        >>> as_id_sequences([[1, 5], [1]], vocabulary_size=10)
        ([[1, 5], [1]], True)
        >>> as_id_sequences([1, 5], vocabulary_size=10)
        ([[1, 5]], False)
    """
    tensorflow = loaded_tensorflow()
    if tensorflow is not None and isinstance(ids, tensorflow.RaggedTensor):
        ids = ids.to_list()
    if isinstance(ids, (list, tuple)):
        batched = any(np.ndim(item) > 0 for item in ids)
        sequences = ids if batched else [ids]
    else:
        array = to_numpy(ids)
        if array.ndim > 2:
            raise ValueError(
                "`ids` must have at most two dimensions, (batch, length). "
                f"Received an array of shape {array.shape}."
            )
        batched = array.ndim == 2
        sequences = array if batched else [array.reshape(-1)]
    return [_as_id_list(ids, vocabulary_size) for ids in sequences], batched


def _as_id_list(ids, vocabulary_size):
    array = to_numpy(ids)
    if array.size == 0:
        return []
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise ValueError(
            "`ids` must be integers, in one list per text. "
            f"Received: {ids!r} of type {type(ids).__name__}."
        )
    for bad in (array.min(), array.max()):
        if not 0 <= bad < vocabulary_size:
            raise ValueError(
                "`ids` must be in the vocabulary, from 0 to "
                f"{vocabulary_size - 1}. Received: {bad}"
            )
    return array.tolist()


def as_token_ids(
    token_ids: Any, vocabulary_size: int, name: str = "token_ids"
) -> np.ndarray:
    """Converts token ids to an array.

    Args:
        token_ids: integers `(batch, length)`: nested lists, an array or a tensor.
        vocabulary_size: number of token ids; valid ids are 0 to `vocabulary_size - 1`.
        name: name of the argument in error messages.

    Returns:
        int32 array `(batch, length)`.

    Raises:
        ValueError: if the shape is wrong, an element is not an integer, or an id is not
            in the vocabulary. Backends would clamp such an id, or return NaN for it.
    """
    ids = to_numpy(token_ids)
    if ids.ndim != 2 or 0 in ids.shape:
        raise ValueError(
            f"`{name}` must have the shape (batch, length), without zeros. "
            f"Received: shape {ids.shape}"
        )
    if ids.dtype.kind not in "iu":
        raise ValueError(f"`{name}` must be integers. Received: dtype {ids.dtype}")
    outside = ids[(ids < 0) | (ids >= vocabulary_size)]
    if outside.size:
        raise ValueError(
            f"`{name}` must be from 0 to {vocabulary_size - 1}, the vocabulary of this "
            f"model. Received: {sorted(set(outside.tolist()))[:5]}. Check that the "
            "tokenizer belongs to the model."
        )
    return ids.astype("int32")


def as_unique_ids(
    ids: int | Sequence[int], vocabulary_size: int, name: str
) -> list[int]:
    """Converts a token id, or several, to a list without duplicates.

    Args:
        ids: an integer or several; possibly none.
        vocabulary_size: number of token ids; valid ids are 0 to `vocabulary_size - 1`.
        name: name of the argument in error messages.

    Returns:
        The ids, in their order.

    Raises:
        ValueError: if an element is not an integer, or not in the vocabulary.

    Example:
        >>> as_unique_ids([2, 77, 2], vocabulary_size=100, name="end_token_ids")
        [2, 77]
    """
    array = np.atleast_1d(to_numpy(ids))
    if not array.size:
        return []
    return list(dict.fromkeys(as_token_ids([array], vocabulary_size, name)[0].tolist()))


def as_padding_mask(padding_mask: Any, shape: tuple[int, ...]) -> np.ndarray:
    """Converts a padding mask to an array.

    Args:
        padding_mask: values of the given shape, or `None` if there is no padding.
        shape: shape of the token ids.

    Returns:
        bool array of that shape.

    Raises:
        ValueError: if the mask has another shape.

    Example:
        >>> as_padding_mask(None, (1, 2))
        array([[ True,  True]])
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


def unpadded_ids(
    inputs: dict[str, Any], vocabulary_size: int
) -> tuple[list[list[int]], int]:
    """Removes the padding of KerasHub's dict of arrays.

    Args:
        inputs: dict of `"token_ids"` `(batch, length)`, and optionally a
            `"padding_mask"` of the same shape.
        vocabulary_size: number of token ids; valid ids are 0 to `vocabulary_size - 1`.

    Returns:
        `(sequences, length)`: the token ids, and the length of the arrays in tokens.

    Raises:
        ValueError: if a shape or an id is wrong, a sequence is empty,
            or the padding is not on the right.

    Example:
        >>> unpadded_ids({"token_ids": [[5, 6, 0]], "padding_mask": [[1, 1, 0]]}, 10)
        ([[5, 6]], 3)
    """
    ids = as_token_ids(inputs["token_ids"], vocabulary_size)
    mask = as_padding_mask(inputs.get("padding_mask"), ids.shape)
    lengths = mask.sum(axis=1)
    if not lengths.all():
        raise ValueError(
            "Each sequence of `token_ids` needs at least one unmasked token. "
            "`padding_mask` has none for the sequences "
            f"{np.flatnonzero(lengths == 0).tolist()}"
        )
    for number, length in enumerate(lengths):
        if not mask[number, :length].all():
            raise ValueError(
                "`padding_mask` must have its padding on the right. Received: "
                f"sequence {number} has {mask[number].astype(int).tolist()}"
            )
    sequences = [
        sequence[:length].tolist()
        for sequence, length in zip(ids, lengths, strict=True)
    ]
    return sequences, ids.shape[1]


def pad_sequences(
    sequences: Sequence[Sequence[int]], length: int
) -> dict[str, np.ndarray]:
    """Pads sequences on the right to KerasHub's dict of arrays.

    Args:
        sequences: token ids of each sequence, at most `length`.
        length: length of the arrays, in tokens.

    Returns:
        Dict of `"token_ids"`, int32, and `"padding_mask"`, bool, of shape
        `(batch, length)`.

    Example:
        >>> pad_sequences([[5, 6]], 3)["padding_mask"]
        array([[ True,  True, False]])
    """
    token_ids = np.full((len(sequences), length), PAD_TOKEN_ID, "int32")
    padding_mask = np.zeros((len(sequences), length), "bool")
    for i, ids in enumerate(sequences):
        token_ids[i, : len(ids)] = ids
        padding_mask[i, : len(ids)] = True
    return {"token_ids": token_ids, "padding_mask": padding_mask}
