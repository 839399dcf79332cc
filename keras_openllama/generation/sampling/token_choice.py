"""The choice of the next token of each sequence of a batch by its own controls.

The controls are arrays with one row for each sequence, so a compiled program serves all
of their values. A random number from the host chooses each token: the token is the
value of the inverse cumulative distribution there. So the tokens of a
sequence depend on its seed, and not on its batch or on the backend, up to rounding of
the logits.

Neither top-k nor top-p sorts: a vocabulary of 32,000 tokens takes several milliseconds
to sort on a CPU. Bisection finds the score of the last token that is kept.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from keras import ops

from keras_openllama.generation.sampling.arrays import SamplingArrays
from keras_openllama.utils.types import Tensor

# In float32, a score that is lower than the highest one by this has probability 0.
SCORE_RANGE = 104.0
# Halvings of that range after which float32 does not resolve the interval.
HALVINGS = 32
# Tokens of a block of the vocabulary. Cumulative sums within one block, and over the
# sums of blocks, are faster than over the vocabulary.
BLOCK = 128


class ChosenTokens(NamedTuple):
    """The result of `choose_tokens`.

    The log-probabilities, in nats, are those of the model, before the controls. They
    are `()` if they are not requested.

    Attributes:
        tokens: int32 `(batch,)`.
        logprobs: float32 `(batch,)`, log-probabilities of these tokens.
        top_tokens: int32 `(batch, number)`, the most likely tokens, in descending
            order.
        top_logprobs: float32 `(batch, number)`, their log-probabilities.
    """

    tokens: Tensor
    logprobs: Tensor | tuple[()] = ()
    top_tokens: Tensor | tuple[()] = ()
    top_logprobs: Tensor | tuple[()] = ()


def choose_tokens(
    logits: Tensor,
    arrays: SamplingArrays,
    counts: Tensor,
    uniforms: Tensor,
    step: Tensor | int,
    num_top_logprobs: int | None = None,
) -> ChosenTokens:
    """Chooses the next token of each sequence.

    Args:
        logits: float32 `(batch, vocabulary_size)`; minus infinity for ids without a
            token.
        arrays: the controls.
        counts: int32 `(batch, vocabulary_size)`, how often the new text contains each
            token; see `count_tokens`.
        uniforms: float32 `(batch,)`, a number of `uniform_numbers` for each sequence.
        step: int scalar or `(batch,)`, how many tokens were generated before.
        num_top_logprobs: of how many of the most likely tokens log-probabilities are
            returned, at least 0; `None` for no log-probabilities at all. It is part of
            the program.

    Returns:
        The tokens.

    Example:
        >>> from keras_openllama import SamplingConfig
        >>> from keras_openllama.generation.sampling.arrays import sampling_arrays
        >>> configs = [SamplingConfig(temperature=0, logit_bias={2: 5.0})]
        >>> arrays = sampling_arrays(configs, [[1]], vocabulary_size=4)
        >>> logits = np.array([[0.0, 3.0, 1.0, 2.0]], "float32")
        >>> counts = np.zeros((1, 4), "int32")
        >>> choose_tokens(logits, arrays, counts, np.zeros(1, "float32"), 0).tokens
        Array([2], dtype=int32)
    """
    scores = adjust_logits(logits, arrays, counts, step)
    is_random = arrays.temperature > 0
    tokens = ops.cond(
        ops.any(is_random),
        lambda: ops.where(
            is_random,
            invert_cumulative(token_weights(scores, arrays), uniforms),
            first_maximum(scores),
        ),
        lambda: first_maximum(scores),
    )
    if num_top_logprobs is None:
        return ChosenTokens(tokens)
    return add_logprobs(logits, tokens, num_top_logprobs)


def add_logprobs(logits: Tensor, tokens: Tensor, num_top_logprobs: int) -> ChosenTokens:
    """Returns tokens with their log-probabilities.

    Args:
        logits: see `choose_tokens`, as for `num_top_logprobs`.
        tokens: int32 `(batch,)`.
        num_top_logprobs: see there.

    Example:
        >>> logits = np.log(np.array([[0.25, 0.75]], "float32"))
        >>> add_logprobs(logits, np.array([0]), 0).logprobs.round(3)
        Array([-1.386], dtype=float32)
    """
    normalizer = ops.logsumexp(logits, axis=-1, keepdims=True)
    logprobs = ops.take_along_axis(logits, tokens[:, None], axis=-1) - normalizer
    if num_top_logprobs == 0:
        return ChosenTokens(tokens, logprobs[:, 0])
    top_logits, top_tokens = ops.top_k(logits, num_top_logprobs)
    return ChosenTokens(
        tokens, logprobs[:, 0], ops.cast(top_tokens, "int32"), top_logits - normalizer
    )


def count_tokens(counts: Tensor, tokens: Tensor) -> Tensor:
    """Counts new tokens.

    Args:
        counts: int32 `(batch, vocabulary_size)`.
        tokens: int `(batch,)`, one token of each sequence.

    Returns:
        The new counts.

    Example:
        >>> count_tokens(np.zeros((2, 3), "int32"), np.array([0, 2]))
        Array([[1, 0, 0],
               [0, 0, 1]], dtype=int32)
    """
    numbers = ops.arange(counts.shape[-1], dtype="int32")
    return counts + ops.cast(ops.equal(numbers, tokens[:, None]), "int32")


def adjust_logits(
    logits: Tensor, arrays: SamplingArrays, counts: Tensor, step: Tensor | int
) -> Tensor:
    """Applies biases and penalties, and excludes tokens.

    Args:
        logits: see `choose_tokens`, as for all arguments.
        arrays: see there.
        counts: see there.
        step: see there.

    Returns:
        float32 `(batch, vocabulary_size)`, the new logits.

    Example:
        >>> from keras_openllama import SamplingConfig
        >>> from keras_openllama.generation.sampling.arrays import sampling_arrays
        >>> configs = [SamplingConfig(frequency_penalty=0.5)]
        >>> arrays = sampling_arrays(configs, [[1]], vocabulary_size=2)
        >>> logits = np.array([[3.0, 4.0]], "float32")
        >>> adjust_logits(logits, arrays, np.array([[0, 3]]), 3)
        Array([[3. , 2.5]], dtype=float32)
    """
    scores = logits + arrays.bias
    is_new = counts > 0
    penalty = arrays.repetition_penalty[:, None]
    repeated = ops.where(scores < 0, scores * penalty, scores / penalty)
    scores = ops.where(ops.logical_or(arrays.in_prompt, is_new), repeated, scores)
    scores -= arrays.presence_penalty[:, None] * ops.cast(is_new, "float32")
    scores -= arrays.frequency_penalty[:, None] * ops.cast(counts, "float32")
    too_early = (step < arrays.min_new_tokens)[:, None]
    return ops.where(ops.logical_and(too_early, arrays.is_stop), -np.inf, scores)


def token_weights(scores: Tensor, arrays: SamplingArrays) -> Tensor:
    """Applies temperature, top-k, top-p and min-p.

    Args:
        scores: float32 `(batch, vocabulary_size)`, the result of `adjust_logits`.
        arrays: the controls.

    Returns:
        float32 `(batch, vocabulary_size)`, numbers that are proportional to the
        probabilities of the tokens; 0 for excluded ones, 1 for the most likely one.

    Example:
        >>> from keras_openllama import SamplingConfig
        >>> from keras_openllama.generation.sampling.arrays import sampling_arrays
        >>> arrays = sampling_arrays([SamplingConfig(top_k=2)], [[1]], 3)
        >>> token_weights(np.log(np.array([[0.2, 0.3, 0.5]], "float32")), arrays)
        Array([[0. , 0.6, 1. ]], dtype=float32)
    """
    is_greedy = arrays.temperature == 0
    temperature = ops.where(is_greedy, 1.0, arrays.temperature)[:, None]
    scores = scores / temperature
    scores = scores - ops.max(scores, axis=-1, keepdims=True)
    weights = ops.exp(scores)
    top_k = ops.cast(arrays.top_k, "float32")[:, None]
    top_p = arrays.top_p[:, None]

    def keep_top_k():
        cutoff = _cutoff(scores, ops.ones_like(scores), top_k)
        return ops.where(scores > cutoff, weights, 0.0)

    weights = ops.cond(ops.any(top_k < scores.shape[-1]), keep_top_k, lambda: weights)

    def keep_top_p():
        # All weights may sum up to more than their total by rounding.
        total = ops.sum(weights, axis=-1, keepdims=True)
        mass = ops.where(top_p < 1, top_p * total, np.inf)
        return ops.where(scores > _cutoff(scores, weights, mass), weights, 0.0)

    weights = ops.cond(ops.any(top_p < 1), keep_top_p, lambda: weights)
    return ops.where(scores < ops.log(arrays.min_p)[:, None], 0.0, weights)


def _cutoff(scores, weights, limit):
    """Returns the score above which tokens are kept, `(batch, 1)`.

    A token is kept if the weights of the tokens with higher scores sum up to less than
    `limit`.

    Args:
        scores: float32 `(batch, vocabulary_size)`, at most 0, which one of them is.
        weights: float32 `(batch, vocabulary_size)`.
        limit: float32 `(batch, 1)`, positive.
    """

    def halve(_, interval):
        low, high = interval
        middle = (low + high) / 2
        above = ops.sum(ops.where(scores > middle, weights, 0.0), -1, keepdims=True)
        is_low = above >= limit
        return ops.where(is_low, middle, low), ops.where(is_low, high, middle)

    high = ops.zeros_like(limit)
    return ops.fori_loop(0, HALVINGS, halve, (high - SCORE_RANGE, high))[0]


def invert_cumulative(weights: Tensor, uniforms: Tensor) -> Tensor:
    """Inverts the cumulative distribution of tokens.

    Args:
        weights: float32 `(batch, vocabulary_size)`, proportional to probabilities.
        uniforms: float32 `(batch,)`, at least 0 and less than 1.

    Returns:
        int32 `(batch,)`, the first tokens whose cumulative probability exceeds these
        numbers. Tokens of weight 0 are never chosen.

    Example:
        >>> weights = np.array([[1.0, 0.0, 3.0]], "float32")
        >>> invert_cumulative(weights, np.array([0.25], "float32"))
        Array([2], dtype=int32)
    """
    batch, size = weights.shape
    weights = ops.pad(weights, ((0, 0), (0, -size % BLOCK)))
    weights = ops.reshape(weights, (batch, -1, BLOCK))
    sums = ops.sum(weights, axis=-1)
    target = uniforms * ops.sum(sums, axis=-1)
    block, before = _first_exceeding(sums, target)
    weights = ops.take_along_axis(weights, block[:, None, None], axis=1)[:, 0]
    return block * BLOCK + _first_exceeding(weights, target - before)[0]


def _first_exceeding(weights, target):
    """Returns where cumulative sums first exceed a target, and the sum before it.

    Args:
        weights: float32 `(batch, size)`.
        target: float32 `(batch,)`.
    """
    sums = ops.cumsum(weights, axis=-1)
    # Parallel sums are not monotonic to the last bit, and may not reach the target.
    candidates = ops.where(weights > 0, sums, 0.0)
    last = ops.max(candidates, axis=-1, keepdims=True)
    found = ops.logical_or(candidates > target[:, None], candidates == last)
    index = _first(found)
    before = ops.take_along_axis(sums - weights, index[:, None], axis=-1)[:, 0]
    return index, before


def first_maximum(scores: Tensor) -> Tensor:
    """Returns the index of the maximum of each row, the first one of equal ones.

    XLA vectorizes it on CPUs, unlike `argmax`.

    Args:
        scores: `(batch, size)`.

    Returns:
        int32 `(batch,)`.

    Example:
        >>> first_maximum(np.array([[1.0, 3.0, 3.0]]))
        Array([1], dtype=int32)
    """
    return _first(ops.equal(scores, ops.max(scores, axis=-1, keepdims=True)))


def _first(is_true):
    size = is_true.shape[-1]
    numbers = ops.arange(size, dtype="int32")
    return ops.min(ops.where(is_true, numbers, size - 1), axis=-1)
