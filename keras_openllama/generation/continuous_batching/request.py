"""What an `Engine` is asked for, and what it answers."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal, Protocol, TypeAlias

import numpy as np

from keras_openllama.generation.limits import ContextLengthError
from keras_openllama.generation.sampling.config import SamplingConfig
from keras_openllama.text.token_arrays import as_id_sequences, as_unique_ids
from keras_openllama.utils.validation import check_integer

if TYPE_CHECKING:
    from keras_openllama.backend.keras_hub import CausalLM
    from keras_openllama.generation.continuous_batching.slot_sampler import ChosenToken

FinishReason: TypeAlias = Literal["stop", "length", "cancelled", "error"]


class QueueFullError(RuntimeError):
    """As many requests wait as the queue of an `Engine` may have."""


class EngineStoppedError(RuntimeError):
    """An `Engine` was shut down, or could not go on after an error."""


class TokenConstraint(Protocol):
    """Restricts the tokens of a request, for example to a JSON schema."""

    def allowed(self) -> np.ndarray:
        """Returns bool `(vocabulary_size,)`: which tokens may come next."""

    def accept(self, token_id: int) -> None:
        """Takes the token that was chosen."""


@dataclasses.dataclass(frozen=True)
class EngineRequest:
    """A prompt to continue.

    Attributes:
        prompt_ids: token ids of the prompt, at least one.
        max_new_tokens: most tokens to generate.
        sampling: how tokens are chosen.
        stop_token_ids: ids that end the sequence.
        top_logprobs: of how many of the most likely tokens log-probabilities are
            returned, besides that of the chosen token; `None` for none at all.
        prompt_logprobs: the same for the tokens of the prompt, in an event before the
            first token.
        constraint: restricts the tokens; it is called from the thread of the engine.
        sample: number of the sequence among those of one prompt with the same seed,
            from 0.
        adapter: name of the adapters of the model among the `NamedAdapters` of the
            engine; `None` for the model as the engine was given it.

    Example:
        >>> from keras_openllama import SamplingConfig
        >>> greedy = SamplingConfig(temperature=0)
        >>> request = EngineRequest([1, 357], max_new_tokens=4, sampling=greedy)
    """

    prompt_ids: Sequence[int]
    max_new_tokens: int
    sampling: SamplingConfig
    stop_token_ids: Sequence[int] = ()
    top_logprobs: int | None = None
    prompt_logprobs: int | None = None
    constraint: TokenConstraint | None = None
    sample: int = 0
    adapter: str | None = None

    def validated(self, model: CausalLM, context: int) -> EngineRequest:
        """Returns the request with lists of ints.

        Args:
            model: `OpenLlamaCausalLM`.
            context: most tokens of a sequence.

        Raises:
            ValueError: for an empty prompt, ids outside of the vocabulary, numbers out
                of range, or more tokens than the context has.
        """
        size = model.backbone.vocabulary_size
        (prompt_ids,), batched = as_id_sequences(list(self.prompt_ids), size)
        if batched or not prompt_ids:
            raise ValueError(
                "`prompt_ids` must be the token ids of one prompt, at least one. "
                f"Received: prompt_ids={self.prompt_ids!r}"
            )
        check_integer("max_new_tokens", self.max_new_tokens, least=0)
        check_integer("sample", self.sample, least=0)
        for name in ("top_logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                check_integer(name, getattr(self, name), least=0, most=size)
        needed = len(prompt_ids) + self.max_new_tokens
        if needed > context:
            raise ContextLengthError(
                f"The prompt has {len(prompt_ids)} tokens, and `max_new_tokens`="
                f"{self.max_new_tokens} more are requested, but a sequence has at most "
                f"{context} tokens. Shorten the prompt, or request fewer.",
                len(prompt_ids),
                context,
            )
        stop_ids = list(self.stop_token_ids)
        if stop_ids:
            stop_ids = as_unique_ids(stop_ids, size, "stop_token_ids")
        return dataclasses.replace(self, prompt_ids=prompt_ids, stop_token_ids=stop_ids)


@dataclasses.dataclass(frozen=True)
class TokenEvent:
    """A new token of a request, or its end, or both; or the scores of its prompt.

    Attributes:
        token_id: the token, which may be a stop id; `None` if the request ended without
            a further one, and for the scores of the prompt.
        logprob: the natural logarithm of its probability, if requested.
        top_logprobs: the most likely tokens and their log-probabilities, if requested.
        finish_reason: why the request ended; `None` before its last event.
        error: the exception, if the reason is `"error"`.
        prompt: the tokens of the prompt from the second on, with log-probabilities;
            `None` in all other events.
    """

    token_id: int | None
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()
    finish_reason: FinishReason | None = None
    error: Exception | None = None
    prompt: tuple[ChosenToken, ...] | None = None


class RequestHandle:
    """A request that was submitted to an `Engine`.

    Attributes:
        id: number of the request.
        request: the `EngineRequest`.
        prompt_tokens: number of tokens of the prompt.
        cached_tokens: how many of them were in the prompt cache.
        new_tokens: the tokens that were generated so far.
        submitted: time of submission, in seconds of `time.monotonic`.
        first_token: time of the first token; `None` before.
        finished: a `threading.Event` that is set after the last token event.
    """

    def __init__(
        self,
        number: int,
        request: EngineRequest,
        on_event: Callable[[TokenEvent], None],
        wake: Callable[[], None],
    ) -> None:
        self.id = number
        self.request = request
        self.prompt_tokens = len(request.prompt_ids)
        self.cached_tokens = 0
        self.new_tokens: list[int] = []
        self.submitted = time.monotonic()
        self.first_token: float | None = None
        self.finished = threading.Event()
        self.on_event = on_event
        self.is_cancelled = False
        self._wake = wake

    def cancel(self) -> None:
        """Ends the request before the next step, with the reason `"cancelled"`.

        Has no effect if the request has ended. May be called from any thread, and from
        `on_event`.
        """
        self.is_cancelled = True
        self._wake()
