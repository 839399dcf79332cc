"""What `generate` and `score` accept, checked and brought into one form."""

import numpy as np

from keras_openllama.text.text_arrays import loaded_tensorflow, to_numpy

PAD_TOKEN_ID = 0  # OpenLLaMA has no pad token; 0 stands in, behind a mask.


def is_text(x):
    """Whether `x` is a string or bytes, or a list, array or tensor of them."""
    if isinstance(x, (list, tuple)):
        return bool(x) and all(is_text(item) for item in x)
    dtype = getattr(x, "dtype", None)
    if isinstance(dtype, np.dtype):
        return dtype.kind in "USO"
    # TensorFlow's string type names itself, and TensorFlow need not be imported.
    return isinstance(x, (str, bytes)) or getattr(dtype, "name", None) == "string"


def is_tf_dataset(x):
    """Whether `x` is a `tf.data.Dataset`."""
    tensorflow = loaded_tensorflow()
    return tensorflow is not None and isinstance(x, tensorflow.data.Dataset)


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


def rows_of(inputs, vocabulary_size):
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


def new_token_limits(lengths, max_length, max_new_tokens, default_length, context):
    """How many tokens may be added to each prompt.

    Args:
        lengths: list of int, tokens of the prompts.
        max_length, max_new_tokens: see `OpenLlamaCausalLM.generate`.
        default_length: int, what `max_length` is where neither is given.
        context: int, the longest sequence the model can take.

    Raises:
        ValueError: for limits that are no positive integers, a prompt longer than
            `max_length` or the context, or limits beyond the context.
    """
    for name, value in (("max_length", max_length), ("max_new_tokens", max_new_tokens)):
        is_int = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
        if value is not None and not (is_int and value >= 1):
            raise ValueError(
                f"`{name}` must be an integer of at least 1, or None. "
                f"Received: {name}={value!r}"
            )
    longest = max(lengths)
    remedy = (
        "Shorten the prompt, or load the model with `rope_scaling` to stretch its "
        "context."
    )
    if longest > context:
        raise ValueError(
            f"`inputs` has a prompt of {longest} tokens, and the context of this model "
            f"is {context} tokens. {remedy}"
        )
    if max_length is None and max_new_tokens is None:
        max_length = min(default_length, context)
    if max_length is not None:
        if longest > max_length:
            raise ValueError(
                f"`inputs` has a prompt of {longest} tokens, more than max_length="
                f"{max_length}. Raise `max_length` or shorten the prompt."
            )
        limits = [max_length - length for length in lengths]
        if max_new_tokens is not None:
            limits = [min(limit, max_new_tokens) for limit in limits]
    else:
        limits = [max_new_tokens] * len(lengths)
    needed = max(n + limit for n, limit in zip(lengths, limits, strict=True))
    if needed > context:
        name = "max_new_tokens" if max_length is None else "max_length"
        value = max_new_tokens if max_length is None else max_length
        raise ValueError(
            f"`{name}`={value} asks for sequences of up to {needed} tokens, and the "
            f"context of this model is {context} tokens. Lower it. {remedy}"
        )
    return limits
