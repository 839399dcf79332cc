"""Responses of `/v1/chat/completions`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from keras_openllama.serving.choices import Piece
from keras_openllama.serving.replies import Reply, joined


class ChatReply(Reply):
    """The response to a chat.

    Example:
        >>> reply = ChatReply("nano", token_bytes=[])
        >>> reply.delta(0, Piece("Hi"))["delta"]
        {'content': 'Hi'}

    Source: OpenAI's API reference, "Chat Completions".
    """

    id_prefix = "chatcmpl"

    def opening(self, index: int) -> dict[str, Any]:
        """Returns the first choice of a stream for a text."""
        delta = {"role": "assistant", "content": ""}
        return self._choice(index, None) | {"delta": delta}

    def delta(self, index: int, piece: Piece) -> dict[str, Any]:
        """Returns the choice of a stream for a piece of a text."""
        delta = {"content": piece.text} if piece.text or piece.tokens else {}
        choice = self._choice(index, piece.finish_reason) | {"delta": delta}
        if piece.tokens:
            choice["logprobs"] = self._logprobs(piece)
        return choice

    def choice(self, index: int, pieces: Sequence[Piece]) -> dict[str, Any]:
        """Returns the choice for a complete text."""
        piece = joined(pieces)
        message = {"role": "assistant", "content": piece.text, "refusal": None}
        choice = self._choice(index, piece.finish_reason) | {"message": message}
        if self._has_logprobs:
            choice["logprobs"] = self._logprobs(piece)
        return choice

    def envelope(
        self, choices: list[dict[str, Any]], stream: bool = False
    ) -> dict[str, Any]:
        """Returns the object around choices."""
        kind = "chat.completion.chunk" if stream else "chat.completion"
        return {**self._head, "object": kind, "choices": choices}

    def _choice(self, index, finish_reason):
        return {"index": index, "logprobs": None, "finish_reason": finish_reason}

    def _logprobs(self, piece):
        tokens = [
            self._token(token.token_id, token.logprob)
            | {"top_logprobs": [self._token(*top) for top in token.top]}
            for token in piece.tokens
        ]
        return {"content": tokens, "refusal": None}

    def _token(self, token_id, logprob):
        data = self._token_bytes[token_id]
        text = data.decode(errors="replace")
        return {"token": text, "logprob": logprob, "bytes": list(data)}
