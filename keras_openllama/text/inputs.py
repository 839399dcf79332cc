"""Normalization of user inputs to `generate`, `score`, `fit` and the preprocessor.

Users of KerasHub pass strings, bytes, lists, NumPy arrays and tensors of any backend.
The `normalize_…` functions detect the kind of input, validate it, and return one of a
few classes of `text.input_kinds`, so that no other module checks input types:

- `normalize_prompts` (`generate`): `Texts`, `ChatPrompts`, `TokenArrays` or `Batches`;
- `normalize_sequences` (`score`): `Texts` or `RawInputs`;
- `normalize_examples` (the preprocessor): `Texts`, `Examples` or `GraphTexts`;
- `normalize_training_data` (`fit`): `Texts`, `Examples`, `GraphTexts`, `RawInputs` or
  `Batches`;
- `normalize_texts` (the tokenizer): `Texts`.
"""

import inspect
from typing import Any

import numpy as np

from keras_openllama.backend.arrays import (
    is_graph_tensor,
    loaded_tensorflow,
    to_numpy,
)
from keras_openllama.text.input_kinds import (
    Batches,
    ChatExample,
    ChatPrompts,
    Examples,
    GraphTexts,
    Pair,
    RawInputs,
    Texts,
    TokenArrays,
)
from keras_openllama.text.messages import is_message
from keras_openllama.text.records import (
    Example,
    chat_key,
    chat_messages,
    example_from_record,
    form_of,
    tools_of,
)
from keras_openllama.text.token_arrays import unpadded_ids

PAIR_KEYS = {"prompt", "response"}
_MAX_ERRORS = 20  # Examples that an error message lists.


def normalize_prompts(
    inputs: Any, vocabulary_size: int, has_preprocessor: bool = True
) -> Texts | ChatPrompts | TokenArrays | Batches:
    """Normalizes the inputs of `generate`.

    Args:
        inputs: see `OpenLlamaCausalLM.generate`.
        vocabulary_size: number of token ids; valid ids are 0 to `vocabulary_size - 1`.
        has_preprocessor: whether the model has one. Without a preprocessor only token
            ids are valid.

    Returns:
        The normalized prompts.

    Raises:
        ValueError: if the input is of another kind, empty or malformed.

    Example:
        >>> normalize_prompts("Once upon a time", vocabulary_size=32_000)
        Texts(texts=['Once upon a time'], batched=False)
    """
    if isinstance(inputs, dict) and "token_ids" in inputs:
        return TokenArrays(*unpadded_ids(inputs, vocabulary_size))
    inputs = _as_chats(inputs)
    if not has_preprocessor:
        raise ValueError(
            "The model has no `preprocessor`, so `inputs` must be a dict of "
            '"token_ids" and "padding_mask". Load the model with its tokenizer to pass '
            f"text. Received: inputs of type {type(inputs).__name__}"
        )
    if is_tf_dataset(inputs):
        batches = inputs.as_numpy_iterator()
        return Batches(Texts(_nonempty_prompts(batch).texts, True) for batch in batches)
    if isinstance(inputs, dict):
        return _chats_of_prompt(inputs, "inputs")
    if _is_supervised(inputs):
        prompts = [_chats_of_prompt(x, f"inputs[{i}]") for i, x in enumerate(inputs)]
        return ChatPrompts(
            [_only(one.chats, f"inputs[{i}]") for i, one in enumerate(prompts)],
            True,
            [one.tools[0] for one in prompts],
        )
    return _nonempty_prompts(inputs)


def _as_chats(x):
    """Gives a list of messages, or of such lists, the key of chats."""
    if not isinstance(x, (list, tuple)) or not x:
        return x
    is_chats = all(
        isinstance(chat, (list, tuple)) and chat and all(map(is_message, chat))
        for chat in x
    )
    return {"messages": x} if is_chats or all(map(is_message, x)) else x


def _chats_of_prompt(x, name):
    key = chat_key(x)
    if key is None:
        raise ValueError(
            f'`{name}` must be a string, a chat with the key "messages", or a dict of '
            'arrays with the keys "token_ids" and "padding_mask". Received: keys '
            f"{sorted(x)}"
        )
    chats, batched = _split_chats(x[key], f"{name}[{key!r}]")
    chats = [chat_messages({**x, key: chat}, key, name) for chat in chats]
    tools = tools_of(x, name)
    return ChatPrompts(chats, batched, [tools] * len(chats))


def _nonempty_prompts(inputs):
    prompts = normalize_texts(inputs)
    if not prompts.texts:
        raise ValueError("`inputs` must hold at least one prompt. Received: []")
    return prompts


def normalize_sequences(
    inputs: Any, has_preprocessor: bool = True
) -> Texts | RawInputs:
    """Normalizes the inputs of `score`.

    Args:
        inputs: see `OpenLlamaCausalLM.score`.
        has_preprocessor: whether the model has one. Without a preprocessor only token
            ids are valid.

    Returns:
        The normalized sequences.

    Raises:
        ValueError: if a text is not valid UTF-8.

    Example:
        >>> normalize_sequences([[1, 5, 6]])
        RawInputs(inputs=[[1, 5, 6]])
    """
    if has_preprocessor and _is_text(inputs):
        return normalize_texts(inputs)
    return RawInputs(inputs)


def normalize_training_data(
    x: Any, y: Any = None, has_preprocessor: bool = True
) -> Texts | Examples | GraphTexts | RawInputs | Batches:
    """Normalizes the inputs of `fit`, `evaluate` and `predict`, or a batch of them.

    Args:
        x: see `OpenLlamaCausalLM.fit`.
        y: see `OpenLlamaCausalLM.fit`.
        has_preprocessor: whether the model has one. Without a preprocessor only token
            ids are valid.

    Returns:
        The normalized data. `RawInputs` holds `x` only; `y` stays as it is.

    Raises:
        ValueError: if texts, pairs or chats are malformed, empty or mixed with other
            kinds, or need a preprocessor that the model does not have.

    Example:
        >>> normalize_training_data({"prompt": "2 + 2 =", "response": " 4"})
        Examples(examples=[Pair(prompt='2 + 2 =', response=' 4')], batched=False)
    """
    if _is_batches(x):
        return Batches(x)
    x = _as_chats(x)
    if has_preprocessor and (_is_text(x) or _is_supervised(x)):
        return normalize_examples(x, y)
    # Keras would raise an obscure error for these.
    has_ids = isinstance(x, dict) and "token_ids" in x
    if isinstance(x, (str, bytes, list, tuple, dict)) and not has_ids:
        raise ValueError(
            '`x` must be texts, pairs with the keys "prompt" and "response", or chats '
            'with the key "messages", all of one kind (these need a preprocessor); a '
            'dict of "token_ids" and "padding_mask"; or batches of these. Received: '
            f"{x!r:.200}"
        )
    return RawInputs(x)


def normalize_examples(x: Any, y: Any = None) -> Texts | Examples | GraphTexts:
    """Normalizes the inputs of the preprocessor.

    Args:
        x: see the call of `OpenLlamaCausalLMPreprocessor`.
        y: see the call of `OpenLlamaCausalLMPreprocessor`.

    Returns:
        The normalized examples; `GraphTexts` inside a TensorFlow graph.

    Raises:
        ValueError: if the input is not text, is empty, or lacks a part.

    Example:
        >>> normalize_examples("2 + 2 =", " 4")
        Examples(examples=[Pair(prompt='2 + 2 =', response=' 4')], batched=False)
    """
    x = _as_chats(x)
    if y is not None:
        x = {"prompt": x, "response": y}
    parts = x if isinstance(x, dict) else {None: x}
    in_graph = {key: part for key, part in parts.items() if is_graph_tensor(part)}
    for key, tensor in in_graph.items():
        check_graph_texts(tensor, "x" if key is None else f"x[{key!r}]")
    if in_graph:
        return GraphTexts(x)
    if isinstance(x, dict):
        return _examples_of(x, "x")
    if _is_supervised(x):
        examples, errors = [], []
        for i, one in enumerate(x):
            try:
                found = _examples_of(one, f"x[{i}]").examples
                examples.append(_only(found, f"x[{i}]"))
            except ValueError as error:
                errors.append(str(error))
        check_errors(errors, len(x))
        return Examples(examples, True)
    return normalize_texts(x, name="x")


def check_errors(errors: list[str], total: int) -> None:
    """Raises the errors of several examples as one.

    Args:
        errors: messages that name the example.
        total: number of all examples.

    Raises:
        ValueError: if there are any errors.
    """
    if len(errors) == 1:
        raise ValueError(errors[0])
    if errors:
        more = len(errors) - _MAX_ERRORS
        raise ValueError(
            f"{len(errors)} of {total} examples cannot be used:\n"
            + "\n".join(errors[:_MAX_ERRORS])
            + (f"\n… and {more} more" if more > 0 else "")
        )


def check_graph_texts(tensor: Any, name: str) -> None:
    """Checks that a symbolic TensorFlow tensor holds a text or a batch of texts.

    Args:
        tensor: the tensor, for which `is_graph_tensor` is true.
        name: name of the argument in error messages.

    Raises:
        ValueError: if its dtype is not string, or if it has more than one dimension or
            an unknown number of them.
    """
    if tensor.dtype.name != "string" or tensor.shape.rank not in (0, 1):
        raise ValueError(
            f"`{name}` must be a string tensor with at most one dimension. Received: "
            f"{tensor}"
        )


def as_example(example: Example, name: str) -> str | Pair | ChatExample:
    """Converts an example of `records.example_from_record`.

    Args:
        example: A text, a pair, a chat, or both of the last two.
        name: name of the argument in error messages.

    Returns:
        The example.

    Example:
        >>> as_example({"prompt": "2 + 2 =", "response": " 4"}, "x")
        Pair(prompt='2 + 2 =', response=' 4')
    """
    if isinstance(example, str):
        return example
    pair = None
    if "prompt" in example:
        pair = Pair(example["prompt"], example["response"])
    if "messages" not in example:
        return pair
    return ChatExample(example["messages"], name, example.get("tools"), pair)


def _examples_of(x, name):
    """Normalizes a dict of one or several pairs or chats."""
    form, key = form_of(x), chat_key(x)
    if key and not (form and form[0] == "prompt"):
        chats, batched = _split_chats(x[key], f"{name}[{key!r}]")
        examples = [
            as_example(example_from_record({**x, key: chat}, name), f"{name}[{key!r}]")
            for chat in chats
        ]
        return Examples(examples, batched)
    if form is None:
        raise ValueError(
            f'`{name}` must have the keys "prompt" and "response", or the key '
            f'"messages". Received: keys {sorted(x)}'
        )
    question, about, answer = form
    if isinstance(x[question], (list, tuple)) and all(map(is_message, x[question])):
        return Examples([as_example(example_from_record(x, name), name)], False)
    prompts = normalize_texts(x[question], f"{name}[{question!r}]")
    responses = normalize_texts(x[answer], f"{name}[{answer!r}]").texts
    if len(prompts.texts) != len(responses):
        raise ValueError(
            f"`{name}` has {len(prompts.texts)} prompts and {len(responses)} responses."
        )
    _check_nonempty(responses, name, "response")
    if question == "prompt":
        _check_nonempty(prompts.texts, name, "prompt")
        return Examples(list(map(Pair, prompts.texts, responses)), prompts.batched)
    columns = {question: prompts.texts, answer: responses}
    for key in (about, "system", "system_prompt"):
        if key is not None and x.get(key) is not None:
            columns[key] = normalize_texts(x[key], f"{name}[{key!r}]").texts
    records = [
        dict(zip(columns, row, strict=True))
        for row in zip(*columns.values(), strict=True)
    ]
    return Examples(
        [as_example(example_from_record(one, name), name) for one in records],
        prompts.batched,
    )


def _only(items, name):
    """Returns the only item of a list."""
    if len(items) != 1:
        raise ValueError(
            f"`{name}` must be one pair or one chat. Received: {len(items)} of them"
        )
    return items[0]


def _split_chats(messages, name):
    """Returns a list of chats, and whether `messages` is a batch of them."""
    is_batch = isinstance(messages, (list, tuple)) and not any(
        isinstance(message, (dict, str)) for message in messages
    )
    chats = messages if is_batch and messages else [messages]
    for chat in chats:
        if not isinstance(chat, (list, tuple)) or not chat:
            raise ValueError(
                f"`{name}` must be a non-empty list of messages. Received: {chat!r}"
            )
    return list(chats), is_batch


def _check_nonempty(texts, name, kind):
    empty = [i for i, text in enumerate(texts) if not text]
    if empty:
        raise ValueError(
            f"{len(empty)} of {len(texts)} {kind}s in `{name}` are empty, the first at "
            f"{empty[0]}. Remove them."
        )


def normalize_texts(inputs: Any, name: str = "inputs") -> Texts:
    """Normalizes the inputs of the tokenizer.

    Args:
        inputs: a string, UTF-8 bytes, or a list, tuple, array or TensorFlow tensor of
            them with at most one dimension.
        name: name of the argument in error messages.

    Returns:
        The texts; an empty batch is valid.

    Raises:
        ValueError: if an input is not text, or not valid UTF-8.

    Example:
        >>> normalize_texts([b"bytes", "and text"])
        Texts(texts=['bytes', 'and text'], batched=True)
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
            text.encode()  # A lone surrogate cannot be encoded as UTF-8.
            return text
    except UnicodeError as error:
        raise ValueError(
            f"`{name}` is not valid Unicode text: {error}. Decode it with the right "
            'encoding first, or with `errors="replace"`.'
        ) from error
    raise ValueError(
        f"`{name}` must be a string. Received: {text!r} of type {type(text).__name__}."
    )


# ----- Detection


def _is_text(x):
    """Whether `x` is a string or bytes, or a list, array or tensor of them."""
    if isinstance(x, (list, tuple)):
        return bool(x) and all(_is_text(item) for item in x)
    dtype = getattr(x, "dtype", None)
    if isinstance(dtype, np.dtype):
        return dtype.kind in "USO"
    # The name of TensorFlow's string dtype; checked without importing TensorFlow.
    return isinstance(x, (str, bytes)) or getattr(dtype, "name", None) == "string"


def _is_supervised(x):
    """Whether `x` is pairs or chats: a dict of texts, or a list of such dicts."""
    if isinstance(x, dict):
        return bool(form_of(x) or chat_key(x) or set(x) & PAIR_KEYS)
    return (
        isinstance(x, (list, tuple))
        and bool(x)
        and all(isinstance(item, dict) and "token_ids" not in item for item in x)
    )


def is_tf_dataset(x: Any) -> bool:
    """Returns whether `x` is a `tf.data.Dataset`. Does not import TensorFlow."""
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
