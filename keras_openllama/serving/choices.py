"""One generated text: from the events of the engine to pieces of text."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from keras_openllama.generation.stop_strings import (
    DecodingTokenizer,
    StopStringDecoder,
)

if TYPE_CHECKING:
    from keras_openllama.generation.continuous_batching.engine import TokenEvent

# JSON has no infinity; OpenAI's API sends this number.
MIN_LOGPROB = -9999.0


@dataclasses.dataclass(frozen=True)
class ScoredToken:
    """A token with log-probabilities, in nats.

    Attributes:
        token_id: The token.
        logprob: Its log-probability; `None` for the first token of a prompt.
        top: The most likely tokens and their log-probabilities; `None` as `logprob`.
        offset: Where its text begins, in characters of the text of the choice.
    """

    token_id: int
    logprob: float | None
    top: tuple[tuple[int, float], ...] | None
    offset: int


@dataclasses.dataclass(frozen=True)
class Piece:
    """A piece of a text.

    Attributes:
        text: The text, possibly empty.
        tokens: Its tokens, if log-probabilities are requested.
        finish_reason: `"stop"` or `"length"` in the last piece, `"cancelled"` or
            `"error"` if the text is not complete, otherwise `None`.
    """

    text: str
    tokens: tuple[ScoredToken, ...] = ()
    finish_reason: str | None = None


class ChoiceDecoder:
    """Converts the events of one request of the engine to pieces.

    Args:
        tokenizer: `OpenLlamaTokenizer`.
        prompt_ids: Token ids of the prompt.
        stops: Stop strings.
        end_token_ids: Tokens that end the text and are not a part of it.
        has_logprobs: Whether pieces have tokens with log-probabilities.
        echo: Text of the prompt if the text begins with it, otherwise `None`. With
            log-probabilities, the pieces then have all tokens: those of the prompt and
            the one that ends the text, too.

    Attributes:
        num_tokens: Number of generated tokens, without the one that ends the text.
        finished: Whether the last piece was returned.

    Example:
        >>> from types import SimpleNamespace as Event
        >>> tokenizer = lm.preprocessor.tokenizer
        >>> decoder = ChoiceDecoder(tokenizer, tokenizer("The"), stops=())
        >>> sea, = tokenizer("sea")
        >>> event = Event(token_id=sea, finish_reason="length", prompt=None)
        >>> decoder.push(event)
        Piece(text=' sea', tokens=(), finish_reason='length')
    """

    def __init__(
        self,
        tokenizer: DecodingTokenizer,
        prompt_ids: Sequence[int],
        stops: tuple[str, ...],
        end_token_ids: Collection[int] = (),
        has_logprobs: bool = False,
        echo: str | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._prompt_ids = prompt_ids
        self._is_echoed = echo is not None
        self._echo = echo or ""  # Until it is returned.
        self._offset = len(self._echo)
        self._decoder = StopStringDecoder(tokenizer, prompt_ids, stops)
        self._end_token_ids = end_token_ids
        self._has_logprobs = has_logprobs
        # Tokens whose text may still belong to a stop string.
        self._withheld: list[ScoredToken] = []
        self.num_tokens = 0
        self.finished = False

    def push(self, event: TokenEvent) -> Piece | None:
        """Takes the next event.

        Args:
            event: The event.

        Returns:
            The next piece; `None` if there is nothing new to tell.
        """
        if self.finished:
            return None
        text, self._echo = self._echo, ""
        if event.prompt is not None:
            return Piece(text, self._scored_prompt(event.prompt))
        token_id = event.token_id
        is_end = token_id in self._end_token_ids
        if token_id is not None and self._has_logprobs:
            if self._is_echoed or not is_end:
                offset = self._offset + self._decoder.num_decoded
                self._withheld.append(_scored(event, offset))
        if token_id is not None and not is_end:
            self.num_tokens += 1
            text += self._decoder.push([token_id])
        reason = event.finish_reason
        if self._decoder.stopped:
            reason = "stop"
        elif reason:
            text += self._decoder.flush()
        self.finished = reason is not None
        tokens = self._complete_tokens()
        return Piece(text, tokens, reason) if text or tokens or reason else None

    def _scored_prompt(self, scored):
        """The tokens of the prompt; nothing comes before the first one."""
        decoder = self._tokenizer.stream_decoder(prefix_ids=())
        offsets = [0]
        for token_id in self._prompt_ids[:-1]:
            offsets.append(offsets[-1] + len(decoder.push(token_id)))
        first = ScoredToken(self._prompt_ids[0], None, None, 0)
        rest = zip(scored, offsets[1:], strict=True)
        return first, *(_scored(token, offset) for token, offset in rest)

    def _complete_tokens(self):
        """Removes and returns the tokens whose text has been released."""
        length = self._offset + len(self._decoder.text)
        starts = [token.offset for token in self._withheld]
        if self.finished:
            # A token that does not begin within the text belongs to the stop string.
            keep = [self._decoder.stopped and start >= length for start in starts]
        else:
            ends = [*starts, self._offset + self._decoder.num_decoded][1:]
            keep = [end > length for end in ends]
        tokens = zip(self._withheld, keep, strict=True)
        complete, self._withheld = _split(tokens)
        return complete


def _split(tokens):
    complete, withheld = [], []
    for token, is_withheld in tokens:
        # Tokens stay in their order.
        (withheld if is_withheld or withheld else complete).append(token)
    return tuple(complete), withheld


def _scored(event, offset):
    top = tuple((token, finite_logprob(value)) for token, value in event.top_logprobs)
    return ScoredToken(event.token_id, finite_logprob(event.logprob), top, offset)


def finite_logprob(value: float) -> float:
    """Returns a log-probability that JSON can express.

    Example:
        >>> finite_logprob(float("-inf"))
        -9999.0
    """
    return value if value >= MIN_LOGPROB else MIN_LOGPROB
