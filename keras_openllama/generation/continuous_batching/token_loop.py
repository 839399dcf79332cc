"""`TokenLoop.generate` with the slots of an `Engine`: for streams and prompt caches.

Sequences end one by one, and a prompt whose beginning is in a `PromptCache` is read
from there on.
"""

from __future__ import annotations

import dataclasses
import queue
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from keras_openllama.generation.continuous_batching.engine import Engine, EngineRequest
from keras_openllama.generation.new_tokens import NewTokens
from keras_openllama.generation.sampling.config import SamplingConfig
from keras_openllama.generation.sampling.samplers import is_greedy, is_search_sampler

if TYPE_CHECKING:
    from keras_openllama.backend.keras_hub import CausalLM
    from keras_openllama.generation.prompt_cache import PromptCache
    from keras_openllama.generation.sampling.state import BatchSampling

# Heuristic: most sequences that are decoded at once; the others wait.
NUM_SLOTS = 16


class EngineTokenLoop:
    """Generates tokens for several prompts, each as soon as there is one.

    Args:
        model: `OpenLlamaCausalLM`.
        cache: a `PromptCache`, or `None` for none.

    Raises:
        ValueError: for a cache of another model.

    Example:
        >>> loop = EngineTokenLoop(lm)
        >>> prompt = [1, 357, 1239]  # "The sea"
        >>> for [new_tokens] in loop.generate([prompt], [3], [2], stride=1):
        ...     print(lm.preprocessor.tokenizer.detokenize(new_tokens.ids))
        sh
        ines
        ,
    """

    def __init__(self, model: CausalLM, cache: PromptCache | None = None) -> None:
        self._model, self._cache = model, cache
        if cache is not None:
            cache.use_with(model)

    def generate(
        self,
        prompts: list[list[int]],
        limits: list[int],
        stop_token_ids: Sequence[int],
        stride: int | None = None,
        sampling: BatchSampling | None = None,
        is_stopped: Callable[[int], bool] = lambda index: False,
    ) -> Iterator[list[NewTokens]]:
        """`TokenLoop.generate_with_logprobs`; checks the arguments immediately.

        The arguments are the same, except for these:

        - `stride`: `None` yields once, at the end; otherwise after each token.
        - `sampling`: if `None`, the sampler of the model must be greedy.
        - `is_stopped`: whether a sequence needs no further tokens, by its number. It is
          called after each yield, and such a sequence frees its slot.

        Raises:
            ValueError: if the sampler of the model is not greedy, and would be used.
        """
        requests = self._requests(prompts, limits, stop_token_ids, sampling)
        events = self._events(requests, is_stopped)
        if stride is not None:
            return (
                [event if i == index else NewTokens([]) for i in range(len(prompts))]
                for index, event in events
            )
        return _collect(events, len(prompts))

    def _requests(self, prompts, limits, stop_token_ids, sampling):
        if sampling is not None:
            configs = [
                dataclasses.replace(config, seed=seed)
                for config, seed in zip(sampling.configs, sampling.seeds, strict=True)
            ]
            samples, logprobs = sampling.samples, sampling.logprobs
        elif is_search_sampler(self._model.sampler) or not is_greedy(
            self._model.sampler
        ):
            raise ValueError(
                "A list of prompts for `stream`, and `cache`, need a `SamplingConfig` "
                "as `sampling`, or greedy decoding. Received: a model compiled with "
                f"{type(self._model.sampler).__name__}"
            )
        else:
            configs = [SamplingConfig(temperature=0)] * len(prompts)
            samples, logprobs = [0] * len(prompts), None
        return [
            EngineRequest(
                *(ids, limit, config, stop_token_ids),
                top_logprobs=logprobs,
                sample=sample,
            )
            for ids, limit, config, sample in zip(
                prompts, limits, configs, samples, strict=True
            )
        ]

    def _events(self, requests, is_stopped):
        """Yields pairs of the number of a request and its new tokens."""
        engine = Engine(
            self._model,
            num_slots=min(len(requests), NUM_SLOTS),
            context=max(len(r.prompt_ids) + r.max_new_tokens for r in requests),
            max_queue=len(requests),
            prompt_cache_bytes=0 if self._cache is None else self._cache,
        )
        events: queue.SimpleQueue = queue.SimpleQueue()
        handles = [
            engine.submit(request, lambda e, index=index: events.put((index, e)))
            for index, request in enumerate(requests)
        ]
        engine.start()
        try:
            running = len(requests)
            while running:
                index, event = events.get()
                if event.error is not None:
                    raise event.error
                running -= event.finish_reason is not None
                # A token may follow before the request is cancelled.
                if event.token_id is not None and not handles[index].is_cancelled:
                    yield index, _new_tokens(event)
                    if is_stopped(index):
                        handles[index].cancel()
        finally:
            engine.shutdown(drain=False)


def _new_tokens(event):
    if event.logprob is None:
        return NewTokens([event.token_id])
    return NewTokens([event.token_id], [event.logprob], [dict(event.top_logprobs)])


def _collect(events, number):
    collected = [NewTokens([], [], []) for _ in range(number)]
    for index, new in events:
        for values, added in zip(collected[index], new, strict=True):
            values.extend(added)
    yield collected
