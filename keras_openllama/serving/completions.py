"""Responses of `/v1/completions`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from keras_openllama.serving.choices import Piece
from keras_openllama.serving.replies import Reply, joined


class CompletionReply(Reply):
    """The response to a completion.

    Example:
        >>> reply = CompletionReply("nano", token_bytes=[])
        >>> reply.choice(0, [Piece(" sea", finish_reason="length")])["text"]
        ' sea'

    Source: OpenAI's API reference, "Completions".
    """

    id_prefix = "cmpl"

    def opening(self, index: int) -> dict[str, Any]:
        """Returns the first choice of a stream for a text."""
        return self._choice(index, "", None)

    def delta(self, index: int, piece: Piece) -> dict[str, Any]:
        """Returns the choice of a stream for a piece of a text."""
        choice = self._choice(index, piece.text, piece.finish_reason)
        if piece.tokens:
            choice["logprobs"] = self._logprobs(piece)
        return choice

    def choice(self, index: int, pieces: Sequence[Piece]) -> dict[str, Any]:
        """Returns the choice for a complete text."""
        piece = joined(pieces)
        choice = self._choice(index, piece.text, piece.finish_reason)
        if self._has_logprobs:
            choice["logprobs"] = self._logprobs(piece)
        return choice

    def envelope(
        self, choices: list[dict[str, Any]], stream: bool = False
    ) -> dict[str, Any]:
        """Returns the object around choices, the same in a stream."""
        return {**self._head, "object": "text_completion", "choices": choices}

    def _choice(self, index, text, finish_reason):
        return {
            "index": index,
            "text": text,
            "logprobs": None,
            "finish_reason": finish_reason,
        }

    def _logprobs(self, piece):
        return {
            "tokens": [self._name(token.token_id) for token in piece.tokens],
            "token_logprobs": [token.logprob for token in piece.tokens],
            "top_logprobs": [
                token.top
                and {self._name(token_id): logprob for token_id, logprob in token.top}
                for token in piece.tokens
            ],
            "text_offset": [token.offset for token in piece.tokens],
        }

    def _name(self, token_id):
        r"""The text of a token; `bytes:\xe2` if it is not a text of its own."""
        data = self._token_bytes[token_id]
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
