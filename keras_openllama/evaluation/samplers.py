"""Replaces the sampler of a model temporarily, without compiling the model again."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from keras_openllama.backend.keras_hub import GreedySampler, get_sampler
from keras_openllama.generation.sampling.samplers import check_sampler

if TYPE_CHECKING:
    from keras_openllama.models.causal_lm import OpenLlamaCausalLM


@contextlib.contextmanager
def use_sampler(
    lm: OpenLlamaCausalLM,
    temperature: float = 0.0,
    top_p: float | None = None,
    top_k: int | None = None,
    seed: int | None = None,
) -> Iterator[None]:
    """Replaces the sampler of a model inside a `with` block.

    Args:
        lm: the model.
        temperature: the sampling temperature. 0 is greedy decoding.
        top_p: sample from the most likely tokens whose probabilities add up to this.
        top_k: sample from this many of the most likely tokens; 0 and -1 are all tokens,
            as in transformers and vLLM.
        seed: seed of the sampler.

    Raises:
        ValueError: if an argument is out of range.

    Example:
        >>> with use_sampler(lm, temperature=0.8, top_p=0.95, seed=0):
        ...     text = lm.generate("The sea", max_new_tokens=2)
        >>> text.startswith("The sea")
        True
    """
    top_k = None if top_k in (0, -1) else top_k
    sampler = _make_sampler(temperature, top_p, top_k, seed)
    check_sampler(sampler, lm.backbone.vocabulary_size)
    default, lm.default_sampling = lm.default_sampling, None
    try:
        if temperature == 0 and type(lm.sampler) is GreedySampler:
            yield  # Reuses the compiled programs.
            return
        before = lm.sampler, lm.generate_function
        lm.sampler = sampler
        lm.generate_function = None  # The compiled function contains the sampler.
        try:
            yield
        finally:
            lm.sampler, lm.generate_function = before
    finally:
        lm.default_sampling = default


def _make_sampler(temperature, top_p, top_k, seed):
    if temperature == 0:
        return get_sampler("greedy")
    config = {"temperature": temperature, "seed": seed}
    if top_p is not None:
        name, config = "top_p", {**config, "p": top_p, "k": top_k}
    elif top_k is not None:
        name, config = "top_k", {**config, "k": top_k}
    else:
        name = "random"
    return get_sampler({"class_name": name, "config": config})
