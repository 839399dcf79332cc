"""What a user passes to `generate`, `score`, `fit` and the preprocessor: one door.

Users of KerasHub pass strings, bytes, lists, NumPy arrays and tensors of any backend.
The functions `normalize_…` recognise and check them, and return one of a few classes,
so that nothing behind them asks again what a user has passed:

- `normalize_prompts` (`generate`): `Texts`, `Chats`, `TokenArrays` or `Batches`;
- `normalize_sequences` (`score`): `Texts` or `Arrays`;
- `normalize_examples` (the preprocessor): `Texts`, `Examples` or `GraphTexts`;
- `normalize_training_data` (`fit`): those, `Arrays` or `Batches`;
- `normalize_texts` (the tokenizer): `Texts`.
"""

import dataclasses
import inspect

import numpy as np

from keras_openllama.backend.arrays import (
    is_graph_tensor,
    loaded_tensorflow,
    to_numpy,
)
from keras_openllama.text.token_arrays import unpadded_ids

PAIR = {"prompt", "response"}
CHAT = {"messages"}


# ----- What it can be


@dataclasses.dataclass(frozen=True)
class Texts:
    """Texts.

    Attributes:
        texts: list of strings.
        batched: bool, false if the user passed one text by itself.
    """

    texts: list
    batched: bool


@dataclasses.dataclass(frozen=True)
class Chats:
    """Chats that wait for a reply.

    Attributes:
        chats: list of lists of messages, `{"role": …, "content": …}`.
        batched: bool, false if the user passed one chat by itself.
    """

    chats: list
    batched: bool


@dataclasses.dataclass(frozen=True)
class Pair:
    """A prompt and the response to it; strings, neither of them empty."""

    prompt: str
    response: str


@dataclasses.dataclass(frozen=True)
class Chat:
    """A chat to learn from.

    Attributes:
        messages: list of `{"role": …, "content": …}`, not yet checked: which roles
            there are depends on a template.
        name: string, what error messages call it.
    """

    messages: list
    name: str


@dataclasses.dataclass(frozen=True)
class Examples:
    """Supervised examples.

    Attributes:
        examples: list of `Pair` and `Chat`.
        batched: bool, false if the user passed one example by itself.
    """

    examples: list
    batched: bool


@dataclasses.dataclass(frozen=True)
class GraphTexts:
    """Texts or examples within a TensorFlow graph, whose values are not known yet.

    Attributes:
        tensors: string tensor, or dict of string tensors with the keys of a pair.
    """

    tensors: object


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
class Arrays:
    """No text: token ids, or a dict with them, as the user passed them."""

    arrays: object


@dataclasses.dataclass(frozen=True)
class Batches:
    """A dataset, generator or the like, of batches.

    Attributes:
        batches: for prompts an iterator of `Texts`; for training the dataset itself,
            whose batches `normalize_training_data` takes one by one.
    """

    batches: object


# ----- The doors


def normalize_prompts(inputs, vocabulary_size, has_preprocessor=True):
    """What a user passes to `generate`.

    Args:
        inputs: see `OpenLlamaCausalLM.generate`.
        vocabulary_size: int; token ids are 0 to `vocabulary_size - 1`.
        has_preprocessor: bool; without one only token ids can be used.

    Returns:
        `Texts`, `Chats`, `TokenArrays` or `Batches`.

    Raises:
        ValueError: for anything else, an empty list or batch, or malformed arrays.
    """
    if has_preprocessor and is_tf_dataset(inputs):
        batches = inputs.as_numpy_iterator()
        return Batches(Texts(_some_prompts(batch).texts, True) for batch in batches)
    chats = has_preprocessor and _is_chat(inputs)
    if not has_preprocessor or (isinstance(inputs, dict) and not chats):
        return TokenArrays(*unpadded_ids(inputs, vocabulary_size))
    if not chats:
        return _some_prompts(inputs)
    if not isinstance(inputs, dict):
        return Chats([chat["messages"] for chat in inputs], True)
    messages = inputs["messages"]
    batched = isinstance(messages[0], (list, tuple))
    return Chats(list(messages) if batched else [messages], batched)


def _some_prompts(inputs):
    prompts = normalize_texts(inputs)
    if not prompts.texts:
        raise ValueError("`inputs` must hold at least one prompt. Received: []")
    return prompts


def normalize_sequences(inputs, has_preprocessor=True):
    """What a user passes to `score`.

    Args:
        inputs: see `OpenLlamaCausalLM.score`.
        has_preprocessor: bool; without one only token ids can be used.

    Returns:
        `Texts` or `Arrays`.

    Raises:
        ValueError: if something is not valid UTF-8.
    """
    if has_preprocessor and _is_text(inputs):
        return normalize_texts(inputs)
    return Arrays(inputs)


def normalize_training_data(x, y=None, has_preprocessor=True):
    """What a user passes to `fit`, `evaluate` and `predict`, or a batch of it.

    Args:
        x, y: see `OpenLlamaCausalLM.fit`.
        has_preprocessor: bool; without one only token ids can be used.

    Returns:
        `Texts`, `Examples`, `GraphTexts`, `Arrays` (of `x`; `y` is as it was) or
        `Batches`.

    Raises:
        ValueError: for texts, pairs and chats that are malformed, empty or mixed, or
            cannot be used since there is no preprocessor.
    """
    if _is_batches(x):
        return Batches(x)
    if has_preprocessor and (_is_text(x) or _is_supervised(x)):
        return normalize_examples(x, y)
    # Keras would say something obscure about these.
    has_ids = isinstance(x, dict) and "token_ids" in x
    if isinstance(x, (str, bytes, list, tuple, dict)) and not has_ids:
        raise ValueError(
            '`x` is texts, pairs with the keys "prompt" and "response", or chats with '
            '"messages", all of one kind (these need a preprocessor); a dict of '
            '"token_ids" and "padding_mask"; or batches of any of these. Received: '
            f"{x!r:.200}"
        )
    return Arrays(x)


def normalize_examples(x, y=None):
    """What a user passes to the preprocessor.

    Args:
        x, y: see the call of `OpenLlamaCausalLMPreprocessor`.

    Returns:
        `Texts`, `Examples`, or within a TensorFlow graph `GraphTexts`.

    Raises:
        ValueError: for what is no text, is empty, or lacks a part.
    """
    if y is not None:
        x = {"prompt": x, "response": y}
    if any(map(is_graph_tensor, x.values() if isinstance(x, dict) else [x])):
        return GraphTexts(x)
    if isinstance(x, dict):
        return _examples_of(x, "x")
    if _is_supervised(x):
        return Examples([_example_of(one, f"x[{i}]") for i, one in enumerate(x)], True)
    return normalize_texts(x, name="x")


def _examples_of(x, name):
    """A dict of a pair or a chat, or of several, as `Examples`."""
    if set(x) == CHAT:
        return _chats_of(x["messages"], f"{name}['messages']")
    if set(x) != PAIR:
        raise ValueError(
            f'`{name}` has the keys {sorted(x)}; a pair has "prompt" and "response", a '
            'chat "messages".'
        )
    prompts = normalize_texts(x["prompt"], f"{name}['prompt']")
    responses = normalize_texts(x["response"], f"{name}['response']").texts
    if len(prompts.texts) != len(responses):
        raise ValueError(
            f"`{name}` has {len(prompts.texts)} prompts and {len(responses)} responses."
        )
    _refuse_empty(prompts.texts, name, "prompt")
    _refuse_empty(responses, name, "response")
    return Examples(list(map(Pair, prompts.texts, responses)), prompts.batched)


def _example_of(x, name):
    examples = _examples_of(x, name).examples
    if len(examples) != 1:
        raise ValueError(
            f"`{name}` is one pair or one chat, an item of a list. Received: "
            f"{len(examples)} of them"
        )
    return examples[0]


def _chats_of(messages, name):
    if not isinstance(messages, (list, tuple)):
        raise ValueError(f"`{name}` is a list of messages. Received: {messages!r}")
    batched = not all(isinstance(message, dict) for message in messages)
    chats = messages if batched else [messages]
    return Examples([Chat(chat, name) for chat in chats], batched)


def _refuse_empty(texts, name, kind):
    empty = [i for i, text in enumerate(texts) if not text]
    if empty:
        raise ValueError(
            f"{len(empty)} of {len(texts)} {kind}s in `{name}` are empty, the first at "
            f"{empty[0]}. Leave them out."
        )


def normalize_texts(inputs, name="inputs"):
    """What a user passes to the tokenizer.

    Args:
        inputs: a string, UTF-8 bytes, or a list, tuple, array or TensorFlow tensor of
            them with at most one dimension.
        name: what to call the argument in error messages.

    Returns:
        `Texts`, perhaps none.

    Raises:
        ValueError: if something is not text, or not valid UTF-8.
    """
    if isinstance(inputs, (str, bytes)):
        return Texts([_as_text(inputs, name)], False)
    if hasattr(inputs, "dtype"):
        array = to_numpy(inputs)
        if array.ndim > 1:
            raise ValueError(
                f"`{name}` must be one text or a flat batch of texts. "
                f"Received an array of shape {array.shape}."
            )
        if array.ndim == 0:
            return Texts([_as_text(array.item(), name)], False)
        inputs = array.tolist()
    if not isinstance(inputs, (list, tuple)):
        raise ValueError(
            f"`{name}` must be a string, or a list or array of strings. "
            f"Received: {inputs!r} of type {type(inputs).__name__}."
        )
    return Texts(
        [_as_text(text, f"{name}[{i}]") for i, text in enumerate(inputs)], True
    )


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


# ----- What it is


def _is_text(x):
    """Whether `x` is a string or bytes, or a list, array or tensor of them."""
    if isinstance(x, (list, tuple)):
        return bool(x) and all(_is_text(item) for item in x)
    dtype = getattr(x, "dtype", None)
    if isinstance(dtype, np.dtype):
        return dtype.kind in "USO"
    # TensorFlow's string type names itself, and TensorFlow need not be imported.
    return isinstance(x, (str, bytes)) or getattr(dtype, "name", None) == "string"


def _is_supervised(x):
    """Whether `x` is pairs or chats: a dict of texts, or a list of such dicts."""
    if isinstance(x, dict):
        return bool(set(x) & (PAIR | CHAT))
    return isinstance(x, (list, tuple)) and bool(x) and all(map(_is_dict, x))


def _is_dict(x):
    return isinstance(x, dict) and "token_ids" not in x


def _is_chat(x):
    """Whether `x` is a chat, or a list of chats."""
    return _is_supervised(x) and set(x if isinstance(x, dict) else x[0]) == CHAT


def is_tf_dataset(x):
    """Whether `x` is a `tf.data.Dataset`."""
    tensorflow = loaded_tensorflow()
    return tensorflow is not None and isinstance(x, tensorflow.data.Dataset)


def _is_batches(x):
    """Whether `x` yields batches: `tf.data`, Grain, a `PyDataset`, a generator."""
    from keras.utils import PyDataset

    return (
        is_tf_dataset(x)
        or isinstance(x, PyDataset)
        or inspect.isgenerator(x)
        or (type(x).__module__.startswith("grain") and hasattr(x, "map"))
    )
