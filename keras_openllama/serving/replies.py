"""What replies to completions and chats have in common."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any, Protocol

from keras_openllama.serving.choices import Piece


class Reply(Protocol):
    """The form of the response to one request."""

    def opening(self, index: int) -> dict[str, Any]:
        """Returns the first choice of a stream for a text."""

    def delta(self, index: int, piece: Piece) -> dict[str, Any]:
        """Returns the choice of a stream for a piece of a text."""

    def choice(self, index: int, pieces: Sequence[Piece]) -> dict[str, Any]:
        """Returns the choice for a complete text."""

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
