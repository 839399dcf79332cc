"""The kinds of input that `text.inputs` tells apart, as classes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from keras_openllama.text.messages import Message


@dataclasses.dataclass(frozen=True)
class Texts:
    """One text, or a batch of texts, decoded to `str`.

    Attributes:
        texts: the texts; a batch may be empty.
        batched: whether the user passed a batch, not a single text.
    """

    texts: list[str]
    batched: bool


@dataclasses.dataclass(frozen=True)
class ChatPrompts:
    """Chats to continue.

    Attributes:
        chats: lists of messages, see `messages.normalize_messages`.
        batched: whether the user passed a batch, not a single chat.
        tools: for each chat, the descriptions of tools that it may use, if any.
    """

    chats: list[list[Message]]
    batched: bool
    tools: list[list[Any] | None] = dataclasses.field(default_factory=list)

    def __post_init__(self):
        if not self.tools:
            self.tools.extend([None] * len(self.chats))


@dataclasses.dataclass(frozen=True)
class Pair:
    """A prompt and its response, both non-empty."""

    prompt: str
    response: str


@dataclasses.dataclass(frozen=True)
class ChatExample:
    """A chat to train on.

    Attributes:
        messages: see `messages.normalize_messages`. Their roles are not checked yet:
            the valid ones depend on a chat template.
        name: name of the argument in error messages.
        tools: descriptions of the tools that the chat may use.
        pair: what to train on if there is no chat template.
    """

    messages: list[Message]
    name: str
    tools: list[Any] | None = None
    pair: Pair | None = None


@dataclasses.dataclass(frozen=True)
class Examples:
    """Supervised examples.

    Attributes:
        examples: the examples.
        batched: whether the user passed a batch, not a single example.
    """

    examples: list[Pair | ChatExample]
    batched: bool


@dataclasses.dataclass(frozen=True)
class GraphTexts:
    """Texts or examples inside a TensorFlow graph: symbolic tensors without values.

    Attributes:
        tensors: string tensor, or dict of string tensors with the keys of a pair.
    """

    tensors: Any


@dataclasses.dataclass(frozen=True)
class TokenArrays:
    """Token ids of KerasHub's dict of right-padded arrays.

    Attributes:
        sequences: token ids of each sequence, without padding.
        width: length of the padded arrays, in tokens.
    """

    sequences: list[list[int]]
    width: int


@dataclasses.dataclass(frozen=True)
class RawInputs:
    """Token ids, or a dict with token ids, as the user passed them.

    Attributes:
        inputs: the unchanged inputs.
    """

    inputs: Any


@dataclasses.dataclass(frozen=True)
class Batches:
    """Batches of a dataset, generator or other iterable.

    Attributes:
        batches: for prompts, an iterator of `Texts`. For training, the dataset itself;
            pass each of its batches to `normalize_training_data`.
    """

    batches: Iterable[Any]
