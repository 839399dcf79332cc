"""Decoding of new tokens to text, up to a stop string."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

# Heuristic: tokens between two checks for a stop string, the most that can be wasted.
TOKENS_BETWEEN_STOP_CHECKS = 16


class TokenDecoder(Protocol):
    """Decodes tokens one by one, such as `text.stream_decoder.StreamDecoder`."""

    def push(self, token_id: int) -> str:
        """Takes a token; returns the text that is complete."""

    def flush(self) -> str:
        """Returns the remaining text."""


class DecodingTokenizer(Protocol):
    """The part of `OpenLlamaTokenizer` that a `StopStringDecoder` needs."""

    def stream_decoder(self, prefix_ids: Sequence[int]) -> TokenDecoder:
        """Returns a decoder of tokens that follow `prefix_ids`."""


class StoppableDecoder(Protocol):
    """What `decode_until_stopped` needs of a decoder."""

    stopped: bool

    def push(self, token_ids: Sequence[int]) -> object:
        """Takes the next tokens."""

    def flush(self) -> object:
        """Ends the sequence."""


def decode_until_stopped(
    decoders: Sequence[StoppableDecoder], new_tokens: Iterable[list[list[int]]]
) -> Iterator[None]:
    """Decodes new tokens until all sequences contain a stop string or have ended.

    Args:
        decoders: one decoder per sequence.
        new_tokens: the iterator of `TokenLoop.generate`.

    Yields:
        `None` after each group of new tokens, and at the end.

    Example:
        >>> tokenizer = lm.preprocessor.tokenizer
        >>> decoder = StopStringDecoder(tokenizer, tokenizer("The"), (",",))
        >>> steps = [[tokenizer("sea,")], [tokenizer("not decoded")]]
        >>> for _ in decode_until_stopped([decoder], steps):
        ...     print(repr(decoder.text))
        ' sea'
        ' sea'
    """
    for new in new_tokens:
        for decoder, ids in zip(decoders, new, strict=True):
            decoder.push(ids)
        yield
        if all(decoder.stopped for decoder in decoders):
            break
    for decoder in decoders:
        decoder.flush()
    yield


def normalize_stop_strings(stop: str | Sequence[str] | None) -> tuple[str, ...]:
    """Converts the argument `stop` to a tuple of strings.

    Args:
        stop: `None`, a string, or several strings.

    Returns:
        The stop strings, possibly none.

    Raises:
        ValueError: for other values, or for an empty string.

    Example:
        >>> normalize_stop_strings("###")
        ('###',)
    """
    stops = () if stop is None else (stop,) if isinstance(stop, str) else tuple(stop)
    if not all(isinstance(s, str) and s for s in stops):
        raise ValueError(
            "`stop` must be a string or a list of strings, none of them empty. "
            f"Received: stop={stop!r}"
        )
    return stops


class StopStringDecoder:
    """Decodes the new tokens of a sequence to text, up to the first stop string.

    Args:
        tokenizer: `OpenLlamaTokenizer`.
        prompt_ids: ids that the new tokens follow.
        stops: the stop strings.

    Attributes:
        text: the decoded text, without characters that may begin a stop string.
        stopped: whether a stop string was found.
        num_decoded: number of decoded characters, with those that are withheld or
            belong to a stop string.
        num_tokens: number of tokens up to the one with which it was found, or that were
            pushed until now.

    Example:
        >>> tokenizer = lm.preprocessor.tokenizer
        >>> decoder = StopStringDecoder(tokenizer, tokenizer("The"), ("shore",))
        >>> decoder.push(tokenizer("sea shore"))
        ' sea '
        >>> decoder.stopped
        True
    """

    def __init__(
        self,
        tokenizer: DecodingTokenizer,
        prompt_ids: Sequence[int],
        stops: tuple[str, ...] = (),
    ):
        self._decoder = tokenizer.stream_decoder(prefix_ids=prompt_ids)
        self._stops = stops
        # The last characters may be the beginning of a stop string.
        self._num_withheld = max(map(len, stops), default=1) - 1
        self._pending = ""
        self.text = ""
        self.stopped = False
        self.num_decoded = 0
        self.num_tokens = 0

    def push(self, token_ids: Sequence[int]) -> str:
        """Decodes the next tokens.

        Args:
            token_ids: the next tokens of the sequence.

        Returns:
            The text that was added to `text`.
        """
        added = ""
        for token_id in token_ids:
            if self.stopped:
                break
            self.num_tokens += 1
            added += self._release(self._decoder.push(token_id), self._num_withheld)
        return added

    def flush(self) -> str:
        """Ends the sequence and returns the text that was withheld until now."""
        return self._release(self._decoder.flush(), 0)

    def _release(self, new: str, num_withheld: int) -> str:
        if self.stopped:
            return ""
        self.num_decoded += len(new)
        self._pending += new
        found = [(self._pending.find(s), s) for s in self._stops]
        found = [(start + len(s), start) for start, s in found if start >= 0]
        if found:
            # The stop string that ends first applies, so that the result does not
            # depend on how the tokens are grouped.
            self.stopped = True
            _, start = min(found)
            final, self._pending = self._pending[:start], ""
        else:
            end = max(0, len(self._pending) - num_withheld)
            final, self._pending = self._pending[:end], self._pending[end:]
        self.text += final
        return final
