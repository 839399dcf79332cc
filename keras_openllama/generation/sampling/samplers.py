"""Validation of KerasHub's samplers, and the choice of the next token with them."""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING

import numpy as np
from keras import ops

from keras_openllama.backend.keras_hub import (
    BeamSampler,
    ContrastiveSampler,
    GreedySampler,
    RandomSampler,
    Sampler,
    SpeculativeSampler,
    TopKSampler,
    TopPSampler,
)
from keras_openllama.generation.sampling.config import ZERO_TEMPERATURE
from keras_openllama.utils.types import Tensor
from keras_openllama.utils.validation import check_integer, raise_invalid

if TYPE_CHECKING:
    from keras_openllama.backend.keras_hub import CausalLM

# Samplers whose choice at a temperature of 0 is the most likely token.
_GREEDY_AT_ZERO = (GreedySampler, RandomSampler, TopKSampler, TopPSampler)


def is_search_sampler(sampler: Sampler) -> bool:
    """Returns whether a sampler runs a search instead of choosing single tokens.

    Args:
        sampler: a KerasHub sampler.

    Returns:
        True for beam and contrastive search.

    Example:
        >>> import keras_hub
        >>> is_search_sampler(keras_hub.samplers.BeamSampler())
        True
        >>> is_search_sampler(keras_hub.samplers.TopKSampler(k=5))
        False
    """
    return type(sampler).__call__ is not Sampler.__call__


def check_sampler(sampler: Sampler, vocabulary_size: int) -> None:
    """Checks that `generate` supports a sampler and its arguments.

    A temperature of 0 is greedy decoding, and a `k` above the vocabulary size is all
    tokens.

    Args:
        sampler: a KerasHub sampler.
        vocabulary_size: number of tokens.

    Raises:
        ValueError: for other objects, for `SpeculativeSampler`, for a sampler that
            returns several sequences per prompt, and for arguments out of range.

    Example:
        >>> import keras_hub
        >>> check_sampler(keras_hub.samplers.TopKSampler(k=5), vocabulary_size=32_000)
    """
    if not isinstance(sampler, Sampler):
        raise ValueError(
            "`sampler` must be the name or an instance of a "
            f"`keras_hub.samplers.Sampler`. Received: sampler={sampler!r}"
        )
    if isinstance(sampler, SpeculativeSampler):
        raise ValueError(
            "`SpeculativeSampler` is not supported as a sampler. Pass the draft model "
            "as `draft` to `generate`, and use another sampler, such as 'greedy'. "
            f"Received: sampler={sampler!r}"
        )
    if getattr(sampler, "return_all_beams", False):
        raise ValueError(
            "`generate` returns one sequence per prompt. Use a sampler with "
            f"return_all_beams=False. Received: sampler={sampler!r}"
        )
    _check_arguments(sampler, vocabulary_size)


def _check_arguments(sampler, vocabulary_size):
    name = type(sampler).__name__

    def check_number(argument, is_valid, requirement):
        value = getattr(sampler, argument)
        if not (isinstance(value, (int, float, np.number)) and is_valid(value)):
            raise_invalid(f"{name}.{argument}", value, requirement)

    if type(sampler) in _GREEDY_AT_ZERO:
        check_number(
            "temperature", lambda t: 0 <= t < math.inf, "a number of at least 0"
        )
    else:
        check_number("temperature", lambda t: 0 < t < math.inf, "a positive number")
    if isinstance(sampler, (TopKSampler, TopPSampler)) and sampler.k is not None:
        check_integer(f"{name}.k", sampler.k)
    if isinstance(sampler, TopPSampler):
        check_number("p", lambda p: 0 < p <= 1, "in (0, 1]")
    if isinstance(sampler, BeamSampler):
        check_integer(f"{name}.num_beams", sampler.num_beams)
    if isinstance(sampler, ContrastiveSampler):
        check_integer(f"{name}.k", sampler.k, most=vocabulary_size)
        check_number("alpha", lambda alpha: 0 <= alpha <= 1, "in [0, 1]")


def exclude_undefined_tokens(model: CausalLM, logits: Tensor) -> Tensor:
    """Sets the logits of ids that have no token to minus infinity.

    A model may have more rows than its tokenizer has tokens, for example to make their
    number a multiple of 64. Such ids have no text.

    Args:
        model: `OpenLlamaCausalLM`, whose tokenizer has the tokens.
        logits: float32 `(batch, vocabulary_size)`.

    Returns:
        The logits; unchanged if all ids have tokens, or the model has no tokenizer.

    Example:
        >>> logits = np.zeros((1, 3072), "float32")
        >>> exclude_undefined_tokens(lm, logits) is logits
        True
    """
    undefined = undefined_tokens(model)
    if not undefined:
        return logits
    has_token = np.ones(logits.shape[-1], "bool")
    has_token[undefined] = False
    return ops.where(has_token, logits, -math.inf)


def undefined_tokens(model: CausalLM) -> list[int]:
    """Returns the ids below the vocabulary size of a model that have no token.

    Args:
        model: `OpenLlamaCausalLM`.

    Returns:
        Their numbers; empty if the model has no tokenizer.

    Example:
        >>> undefined_tokens(lm)
        []
    """
    tokenizer = getattr(model.preprocessor, "tokenizer", None)
    if tokenizer is None:
        return []
    return tokenizer.vocabulary.ids_without_token(model.backbone.vocabulary_size)


def is_greedy(sampler: Sampler) -> bool:
    """Returns whether a sampler chooses the most likely token, without randomness.

    Args:
        sampler: a KerasHub sampler that is not a search, see `check_sampler`.

    Returns:
        True for greedy sampling, and for a temperature of 0.

    Example:
        >>> is_greedy(GreedySampler()), is_greedy(TopKSampler(k=5, temperature=0.0))
        (True, True)
        >>> is_greedy(RandomSampler())
        False
    """
    return type(sampler) is GreedySampler or (
        type(sampler) in _GREEDY_AT_ZERO and sampler.temperature < ZERO_TEMPERATURE
    )


def next_tokens(sampler: Sampler, logits: Tensor) -> Tensor:
    """Chooses the next token of each sequence.

    Args:
        sampler: a KerasHub sampler that is not a search, see `check_sampler`.
        logits: float32 `(batch, vocabulary_size)`.

    Returns:
        int `(batch,)`, the token ids.

    Example:
        >>> logits = np.array([[0.0, 2.0, 1.0]], "float32")
        >>> next_tokens(RandomSampler(temperature=0.0), logits)
        Array([1], dtype=int32)
    """
    if is_greedy(sampler):
        return ops.argmax(logits, axis=-1)
    probabilities = sampler.compute_probabilities(logits)
    vocabulary_size = logits.shape[-1]
    if keeps_every_token(sampler, vocabulary_size):
        return RandomSampler.get_next_token(sampler, probabilities)
    if type(sampler) is TopPSampler and (sampler.k or 0) > vocabulary_size:
        sampler = copy.copy(sampler)  # With the same generator of random numbers.
        sampler.k = None
    return sampler.get_next_token(probabilities)


def keeps_every_token(sampler: Sampler, vocabulary_size: int) -> bool:
    """Returns whether a top-k or top-p sampler does not exclude any token.

    KerasHub's `TopPSampler(p=1)` still excludes tokens once the cumulative probability
    exceeds 1 by rounding, and its samplers fail if `k` exceeds the vocabulary size.

    Args:
        sampler: a KerasHub sampler.
        vocabulary_size: number of tokens.

    Returns:
        True for a top-k sampler with at least `vocabulary_size` tokens, and for a top-p
        sampler with p = 1 and as many tokens, or no `k`.

    Example:
        >>> keeps_every_token(TopPSampler(p=1.0), vocabulary_size=32_000)
        True
        >>> keeps_every_token(TopKSampler(k=100), vocabulary_size=32_000)
        False
    """
    if type(sampler) is TopKSampler:
        return sampler.k >= vocabulary_size
    return (
        type(sampler) is TopPSampler
        and sampler.p >= 1
        and (sampler.k is None or sampler.k >= vocabulary_size)
    )
