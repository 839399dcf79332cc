"""The arguments of `generate` that say how tokens are chosen."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

from keras_openllama.generation.sampling.arrays import check_vocabulary, resolve_seed
from keras_openllama.generation.sampling.config import SamplingConfig
from keras_openllama.generation.sampling.samplers import is_greedy, is_search_sampler
from keras_openllama.generation.sampling.state import BatchSampling
from keras_openllama.utils.validation import check_integer, raise_invalid

if TYPE_CHECKING:
    from keras_openllama.backend.keras_hub import CausalLM


@dataclasses.dataclass(frozen=True)
class SamplingOptions:
    """How tokens are chosen, and what is returned with them.

    Attributes:
        sampling: see `OpenLlamaCausalLM.generate`, as for all attributes.
        num_samples: see there.
        logprobs: see there.

    Raises:
        ValueError: for a value of the wrong type or out of range.

    Example:
        >>> options = SamplingOptions(SamplingConfig(top_p=0.9, seed=1), num_samples=2)
        >>> options.resolve(lm, num_prompts=1).samples
        [0, 1]
    """

    sampling: SamplingConfig | Sequence[SamplingConfig] | None = None
    num_samples: int = 1
    logprobs: int | None = None

    def __post_init__(self):
        sampling = self.sampling
        if isinstance(sampling, (list, tuple)):
            is_valid = all(isinstance(config, SamplingConfig) for config in sampling)
        else:
            is_valid = sampling is None or isinstance(sampling, SamplingConfig)
        if not is_valid:
            requirement = "a `SamplingConfig`, a list of them, or None"
            raise_invalid("sampling", sampling, requirement)
        check_integer("num_samples", self.num_samples)
        if self.logprobs is not None:
            check_integer("logprobs", self.logprobs, least=0)

    def resolve(self, model: CausalLM, num_prompts: int) -> BatchSampling | None:
        """Applies the options to the prompts of a batch.

        Args:
            model: `OpenLlamaCausalLM`.
            num_prompts: number of prompts.

        Returns:
            The sampling of `num_samples` sequences for each prompt, those of a prompt
            next to each other; `None` if the sampler of the model does it.

        Raises:
            ValueError: if the options need a `SamplingConfig`, or the sampler is beam
                or contrastive search; if `sampling` has another length than the
                prompts; or if `logprobs` exceeds the vocabulary.
        """
        uses_sampler = self.num_samples == 1 and self.logprobs is None
        if self.sampling is None and uses_sampler:
            return None
        check_integer("logprobs", self.logprobs or 0, 0, model.backbone.vocabulary_size)
        is_search = is_search_sampler(model.sampler)
        has_greedy_sampler = not is_search and is_greedy(model.sampler)
        configs = self._configs(model, num_prompts, is_search, has_greedy_sampler)
        for config in configs:
            check_vocabulary(config, model.backbone.vocabulary_size)
        plain = all(config.is_plain_greedy for config in configs)
        if plain and has_greedy_sampler and self.logprobs is None:
            return None  # The shortest program.
        seeds = [resolve_seed(config.seed) for config in configs]

        def repeat(values):
            return [value for value in values for _ in range(self.num_samples)]

        return BatchSampling(
            configs=repeat(configs),
            seeds=repeat(seeds),
            samples=[*range(self.num_samples)] * num_prompts,
            logprobs=self.logprobs,
        )

    def _configs(self, model, num_prompts, is_search, has_greedy_sampler):
        if is_search:
            raise ValueError(
                "`sampling`, `num_samples` and `logprobs` choose token by token, but "
                f"this model was compiled with {type(model.sampler).__name__}, which "
                "runs a search. Call `compile` with another sampler. Received: "
                f"{self}"
            )
        if self.sampling is None:
            if has_greedy_sampler:
                return [SamplingConfig(temperature=0)] * num_prompts
            raise ValueError(
                "`num_samples` and `logprobs` need a `SamplingConfig` or greedy "
                "decoding, but this model was compiled with the sampler "
                f"{type(model.sampler).__name__}. Pass `sampling`, too. Received: "
                f"{self}"
            )
        if isinstance(self.sampling, SamplingConfig):
            return [self.sampling] * num_prompts
        if len(self.sampling) != num_prompts:
            raise ValueError(
                "A list as `sampling` must have one `SamplingConfig` for each prompt. "
                f"Received: {len(self.sampling)} for {num_prompts} prompts"
            )
        return list(self.sampling)
