"""What a user passes to `generate`, `score` and `fit`: recognised, checked, normalized.

Users of KerasHub pass strings, bytes, lists, NumPy arrays and tensors of any backend.
`normalize_prompts` turns prompts into `Texts`, `Chats`, `TokenArrays` or `Batches`, and
nothing behind it asks again what they are.
"""

import dataclasses
import inspect

import keras
import numpy as np

from keras_openllama.backend.arrays import loaded_tensorflow, to_numpy

PAIR = {"prompt", "response"}
CHAT = {"messages"}
PAD_TOKEN_ID = 0  # OpenLLaMA has no pad token; 0 stands in, behind a mask.


@dataclasses.dataclass(frozen=True)
class Texts:
    """Texts.

    Attributes:
        texts: list of strings, at least one.
        batched: bool, false if the user passed one text by itself.
    """

    texts: list
    batched: bool


@dataclasses.dataclass(frozen=True)
class Chats:
    """Chats.

    Attributes:
        chats: list of lists of messages, `{"role": …, "content": …}`.
        batched: bool, false if the user passed one chat by itself.
    """

    chats: list
    batched: bool


@dataclasses.dataclass(frozen=True)
class TokenArrays:
    """KerasHub's dict of arrays, with its padding on the right.

    Attributes:
        rows: list of lists of int, the tokens of each sequence without padding.
        width: int, length of the arrays.
    """

    rows: list
    width: int


@dataclasses.dataclass(frozen=True)
class Batches:
    """A `tf.data.Dataset` of texts, or of batches of them.

    Attributes:
        batches: iterable of `Texts`.
    """

    batches: object


def normalize_prompts(inputs, vocabulary_size, has_preprocessor=True):
    """What a user passes to `generate`, as one of four classes.

    Args:
        inputs: see `OpenLlamaCausalLM.generate`.
        vocabulary_size: int; token ids are 0 to `vocabulary_size - 1`.
        has_preprocessor: bool; without one only token ids can be used.

    Returns:
        `Texts`, `Chats`, `TokenArrays` or `Batches`.

    Raises:
        ValueError: for anything else, an empty list, or malformed arrays.
    """
    if is_tf_dataset(inputs):
        batches = inputs.as_numpy_iterator()
        return Batches(Texts(as_texts(batch)[0], True) for batch in batches)
    chats = has_preprocessor and is_chat(inputs)
    if not has_preprocessor or (isinstance(inputs, dict) and not chats):
        return TokenArrays(*rows_of(inputs, vocabulary_size))
    if not chats:
        texts, batched = as_texts(inputs)
        if not texts:
            raise ValueError("`inputs` must hold at least one prompt. Received: []")
        return Texts(texts, batched)
    if not isinstance(inputs, dict):
        return Chats([chat["messages"] for chat in inputs], True)
    messages = inputs["messages"]
    batched = isinstance(messages[0], (list, tuple))
    return Chats(list(messages) if batched else [messages], batched)


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


def is_supervised(x):
    """Whether `x` is pairs or chats: a dict of texts, or a list of such dicts."""
    if isinstance(x, dict):
        return bool(set(x) & (PAIR | CHAT))
    return isinstance(x, (list, tuple)) and bool(x) and all(map(_is_dict, x))


def _is_dict(x):
    return isinstance(x, dict) and "token_ids" not in x


def is_chat(x):
    """Whether `x` is a chat, or a list of chats."""
    return is_supervised(x) and set(x if isinstance(x, dict) else x[0]) == CHAT


def is_batches(x):
    """Whether `x` yields batches: `tf.data`, Grain, a `PyDataset`, a generator."""
    return (
        is_tf_dataset(x)
        or isinstance(x, keras.utils.PyDataset)
        or inspect.isgenerator(x)
        or (type(x).__module__.startswith("grain") and hasattr(x, "map"))
    )


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
