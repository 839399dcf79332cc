"""`token_loop.TokenLoop` with the slots of an `Engine`, for `stream` and prompt caches.

Sequences end one by one, and a prompt whose beginning is in a `PromptCache` is read
from there on.
"""

from __future__ import annotations

import queue
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from keras_openllama.generation.engine import Engine, EngineRequest
from keras_openllama.generation.sampling import is_greedy, is_search_sampler
from keras_openllama.generation.sampling_config import SamplingConfig

if TYPE_CHECKING:
    from keras_openllama.backend.keras_hub import CausalLM
    from keras_openllama.generation.prompt_cache import PromptCache

# Heuristic: most sequences that are decoded at once; the others wait.
NUM_SLOTS = 16


class EngineTokenLoop:
    """Generates tokens as `TokenLoop.generate`, with greedy sampling.

    Args:
        model: `OpenLlamaCausalLM`.
        cache: a `PromptCache`, or `None` for none.

    Raises:
        ValueError: for another sampler, or a cache of another model.

    Example:
        >>> loop = EngineTokenLoop(lm)
        >>> new = list(loop.generate([[1, 357, 1239]], [3], [2]))  # "The sea"
        >>> lm.preprocessor.tokenizer.detokenize([ids[0][0] for ids in new])
        'shines,'
    """

    def __init__(self, model: CausalLM, cache: PromptCache | None = None) -> None:
        if is_search_sampler(model.sampler) or not is_greedy(model.sampler):
            raise ValueError(
                "Streams of several prompts and prompt caches support greedy sampling. "
                'Call `compile(sampler="greedy")`. Received: sampler='
                f"{model.sampler!r}"
            )
        self._model, self._cache = model, cache
        if cache is not None:
            cache.use_with(model)

    def generate(
        self,
        prompts: list[list[int]],
        limits: list[int],
        stop_token_ids: Sequence[int],
        stride: int | None = None,
    ) -> Iterator[list[list[int]]]:
        """Yields the new tokens of prompts, each as soon as there is one.

        Args:
            prompts: token ids of each prompt, at least one per prompt.
            limits: maximum number of new tokens for each prompt.
            stop_token_ids: ids that end a sequence.
            stride: without effect.

        Yields:
            For each prompt, its new tokens since the previous yield, including the stop
            id.
        """
        longest = [len(ids) + n for ids, n in zip(prompts, limits, strict=True)]
        engine = Engine(
            self._model,
            num_slots=min(len(prompts), NUM_SLOTS),
            context=max(longest),
            max_queue=len(prompts),
            prompt_cache_bytes=0 if self._cache is None else self._cache,
        )
        events: queue.SimpleQueue = queue.SimpleQueue()
        greedy = SamplingConfig(temperature=0)
        for index, (ids, limit) in enumerate(zip(prompts, limits, strict=True)):
            request = EngineRequest(ids, limit, greedy, stop_token_ids)
            engine.submit(request, lambda e, index=index: events.put((index, e)))
        with engine:
            try:
                running = len(prompts)
                while running:
                    index, event = events.get()
                    if event.error is not None:
                        raise event.error
                    running -= event.finish_reason is not None
                    new = [[] for _ in prompts]
                    if event.token_id is not None:
                        new[index].append(event.token_id)
                    yield new
            finally:
                engine.shutdown(drain=False)
