"""What replies to completions and chats have in common."""

from __future__ import annotations

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from keras_openllama.serving.choices import Piece


class Reply(ABC):
    """The form of the response to one request.

    Args:
        model: Name of the model.
        token_bytes: Bytes of each token.
        has_logprobs: Whether choices have log-probabilities.
    """

    id_prefix: str

    def __init__(
        self, model: str, token_bytes: Sequence[bytes], has_logprobs: bool = False
    ) -> None:
        self._token_bytes = token_bytes
        self._has_logprobs = has_logprobs
        self._head = {
            "id": make_id(self.id_prefix),
            "created": now(),
            "model": model,
        }

    @abstractmethod
    def opening(self, index: int) -> dict[str, Any]:
        """Returns the first choice of a stream for a text."""

    @abstractmethod
    def delta(self, index: int, piece: Piece) -> dict[str, Any]:
        """Returns the choice of a stream for a piece of a text."""

    @abstractmethod
    def choice(self, index: int, pieces: Sequence[Piece]) -> dict[str, Any]:
        """Returns the choice for a complete text."""

    @abstractmethod
    def envelope(
        self, choices: list[dict[str, Any]], stream: bool = False
    ) -> dict[str, Any]:
        """Returns the object around choices."""


def make_id(prefix: str) -> str:
    """Returns a new id, such as `"cmpl-…"`.

    Example:
        >>> make_id("cmpl")[:5]
        'cmpl-'
    """
    return f"{prefix}-{uuid.uuid4().hex}"


def now() -> int:
    """Returns the time in seconds since 1970.

    Example:
        >>> now() > 1.7e9
        True
    """
    return int(time.time())


def joined(pieces: Sequence[Piece]) -> Piece:
    """Joins the pieces of a text.

    Example:
        >>> joined([Piece("The"), Piece(" sea", finish_reason="stop")])
        Piece(text='The sea', tokens=(), finish_reason='stop')
    """
    return Piece(
        "".join(piece.text for piece in pieces),
        tuple(token for piece in pieces for token in piece.tokens),
        pieces[-1].finish_reason,
    )
