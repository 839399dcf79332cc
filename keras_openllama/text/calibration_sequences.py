"""Sequences of token ids for a calibration, from texts."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from keras_openllama.backend.arrays import to_numpy
from keras_openllama.text.token_arrays import as_token_ids
from keras_openllama.utils.validation import raise_invalid


def calibration_sequences(
    dataset: Iterable[Any],
    tokenizer: Callable[[str], Any] | None,
    *,
    length: int,
    count: int,
    vocabulary_size: int,
) -> np.ndarray:
    """Returns sequences of equal length, evenly spaced over a dataset.

    The texts are joined. If the tokenizer has a start token, each text and each
    sequence begins with it.

    Args:
        dataset: Strings, or integer arrays of token ids.
        tokenizer: Tokenizer, or callable from a string to token ids.
        length: Tokens of a sequence. Less if the dataset has less in all.
        count: Number of sequences. Less if the dataset has no more.
        vocabulary_size: Number of token ids.

    Returns:
        int32 array `(sequences, length)`.

    Raises:
        ValueError: If the dataset is no iterable of texts or ids, or almost empty; or
            if ids are not in the vocabulary.

    Example:
        >>> calibration_sequences(
        ...     [[5, 6, 7], [8, 9]], None, length=2, count=8, vocabulary_size=10
        ... ).tolist()
        [[5, 6], [7, 8]]
    """
    if isinstance(dataset, (str, bytes)) or not isinstance(dataset, Iterable):
        raise_invalid(
            "dataset", dataset, "a list of strings, or of integer arrays of token ids"
        )
    start = getattr(tokenizer, "start_token_id", None)
    ids = np.concatenate([_item_ids(x, tokenizer, start) for x in dataset] or [[]])
    if len(ids) < 2:
        raise ValueError(
            f"`dataset` must have at least two tokens. Received: {len(ids)} tokens"
        )
    length = min(length, len(ids))
    sequences = ids[: len(ids) // length * length].reshape(-1, length)
    evenly = np.linspace(0, len(sequences) - 1, min(count, len(sequences)))
    sequences = as_token_ids(sequences[evenly.astype(int)], vocabulary_size, "dataset")
    if start is not None:
        sequences[:, 0] = start
    return sequences


def _item_ids(item, tokenizer, start):
    """Returns the ids of a text, with the start token first if there is one."""
    if isinstance(item, str):
        if tokenizer is None:
            raise_invalid("tokenizer", None, "a tokenizer, since `dataset` has strings")
        item = getattr(tokenizer, "tokenize", tokenizer)(item)
    ids = to_numpy(item).reshape(-1)
    if ids.size and ids.dtype.kind not in "iu":
        raise_invalid(
            "dataset", item, "a list of strings, or of integer arrays of token ids"
        )
    if start is not None and (not ids.size or ids[0] != start):
        ids = np.concatenate([[start], ids])
    return ids.astype("int64")
