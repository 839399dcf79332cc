"""`Generation`: generated text with its tokens and their log-probabilities."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from keras_openllama.generation.new_tokens import NewTokens
from keras_openllama.generation.stop_strings import StopStringDecoder


@dataclasses.dataclass(frozen=True)
class Generation:
    """What `generate` returns for a sequence with `logprobs`.

    Log-probabilities are in nats, of the distribution of the model: before temperature,
    penalties and all other controls, as in OpenAI's API.

    Attributes:
        text: the text, with or without the prompt as without `logprobs`; `None` if the
            model has no tokenizer, or the prompts are token ids.
        token_ids: the new tokens, including the one that ended the sequence.
        logprobs: the log-probability of each new token.
        top_logprobs: for each new token, the most likely tokens at its position, by
            token id in descending order of their log-probabilities.
        finish_reason: `"stop"` after a stop id or stop string, `"length"` at the limit.

    Example:
        >>> result = lm.generate("The sea", max_new_tokens=2, logprobs=1)
        >>> result.text, result.token_ids, result.finish_reason
        ('The sea shines', [455, 1419], 'length')
    """

    text: str | None
    token_ids: list[int]
    logprobs: list[float]
    top_logprobs: list[dict[int, float]]
    finish_reason: str


class GenerationRecorder:
    """Collects the new tokens of a sequence, with log-probabilities, and decodes them.

    Args:
        decoder: decodes the tokens to text; `None` for no text.
        stop_token_ids: ids that end the sequence.

    Attributes:
        stopped: whether the text contains a stop string.

    Example:
        >>> recorder = GenerationRecorder(None, stop_token_ids=[2])
        >>> recorder.push(NewTokens([5, 2], [-0.1, -0.2], [{}, {}]))
        >>> recorder.result().finish_reason
        'stop'
    """

    def __init__(
        self, decoder: StopStringDecoder | None, stop_token_ids: Sequence[int]
    ) -> None:
        self._decoder, self._stop_token_ids = decoder, stop_token_ids
        self._ids, self._logprobs, self._top_logprobs = [], [], []

    @property
    def stopped(self) -> bool:
        """Whether the text contains a stop string."""
        return self._decoder is not None and self._decoder.stopped

    @property
    def text(self) -> str | None:
        """The new text, see `StopStringDecoder`."""
        return None if self._decoder is None else self._decoder.text

    def push(self, new: NewTokens) -> None:
        """Takes the next tokens."""
        self._ids += new.ids
        self._logprobs += new.logprobs
        self._top_logprobs += new.top_logprobs
        if self._decoder is not None:
            self._decoder.push(new.ids)

    def flush(self) -> None:
        """Ends the sequence."""
        if self._decoder is not None:
            self._decoder.flush()

    def result(self, prefix: str = "") -> Generation:
        """Returns the sequence up to its end.

        Args:
            prefix: text before the new one.
        """
        end = self._decoder.num_tokens if self.stopped else len(self._ids)
        ids = self._ids[:end]
        is_ended = self.stopped or (ids and ids[-1] in self._stop_token_ids)
        return Generation(
            text=None if self.text is None else prefix + self.text,
            token_ids=ids,
            logprobs=self._logprobs[:end],
            top_logprobs=self._top_logprobs[:end],
            finish_reason="stop" if is_ended else "length",
        )
