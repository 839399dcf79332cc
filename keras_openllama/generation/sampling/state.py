"""Sampling inside a generation loop: its inputs, its state, and one step.

`TokenLoop` uses it if a `SamplingConfig` chooses the tokens. The inputs stay the same
for a generation; the state changes at each step. Both are on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from keras import ops

from keras_openllama.backend.arrays import to_numpy
from keras_openllama.generation.new_tokens import NewTokens
from keras_openllama.generation.sampling.arrays import (
    SamplingArrays,
    sampling_arrays,
    uniform_numbers,
)
from keras_openllama.generation.sampling.config import SamplingConfig
from keras_openllama.generation.sampling.token_choice import choose_tokens, count_tokens
from keras_openllama.utils.types import Tensor

# Numbers of most likely tokens are rounded up to a power of two from this one, so that
# few programs are compiled.
MIN_TOP_LOGPROBS = 4


class BatchSampling(NamedTuple):
    """How the sequences of a batch are sampled.

    Attributes:
        configs: the controls of each sequence.
        seeds: the seed of each sequence.
        samples: the number of each sequence among those of its prompt, from 0.
        logprobs: for how many of the most likely tokens log-probabilities are wanted;
            `None` for none, not even of the chosen tokens.
    """

    configs: Sequence[SamplingConfig]
    seeds: Sequence[int]
    samples: Sequence[int]
    logprobs: int | None = None


class SamplingInputs(NamedTuple):
    """What sampling reads at each step.

    Attributes:
        arrays: the controls.
        uniforms: float32 `(batch, steps)`, see `sampling_arrays.uniform_numbers`.
    """

    arrays: SamplingArrays
    uniforms: Tensor


class SamplingState(NamedTuple):
    """What sampling records. Log-probabilities are `()` if they are not wanted.

    Attributes:
        counts: int32 `(batch, vocabulary_size)`, how often the new text contains each
            token.
        logprobs: float32 `(batch, steps)`, see `token_choice.ChosenTokens`.
        top_tokens: int32 `(batch, steps, number)`.
        top_logprobs: float32 `(batch, steps, number)`.
    """

    counts: Tensor
    logprobs: Tensor | tuple[()] = ()
    top_tokens: Tensor | tuple[()] = ()
    top_logprobs: Tensor | tuple[()] = ()


def start_sampling(
    sampling: BatchSampling,
    prompts: Sequence[Sequence[int]],
    shape: tuple[int, int],
    vocabulary_size: int,
    stop_token_ids: Sequence[int],
) -> tuple[SamplingInputs, SamplingState]:
    """Creates the inputs and the initial state.

    Args:
        sampling: how to sample each sequence.
        prompts: token ids of each prompt.
        shape: `(batch, steps)` of the loop. Sequences beyond those of `sampling` are
            greedy.
        vocabulary_size: number of tokens.
        stop_token_ids: ids that end a sequence.

    Returns:
        NumPy arrays.

    Example:
        >>> sampling = BatchSampling([SamplingConfig()], seeds=[7], samples=[0])
        >>> inputs, state = start_sampling(sampling, [[1]], (1, 256), 3072, [2])
        >>> inputs.uniforms.shape, state.counts.shape
        ((1, 256), (1, 3072))
    """
    batch, steps = shape
    filler = batch - len(prompts)
    arrays = sampling_arrays(
        [*sampling.configs, *[SamplingConfig(temperature=0)] * filler],
        [*prompts, *[[]] * filler],
        vocabulary_size,
        stop_token_ids,
    )
    uniforms = np.zeros(shape, "float32")
    for row, seed_and_sample in enumerate(
        zip(sampling.seeds, sampling.samples, strict=True)
    ):
        uniforms[row] = uniform_numbers(*seed_and_sample, steps)
    state = SamplingState(np.zeros((batch, vocabulary_size), "int32"))
    if sampling.logprobs is not None:
        state = state._replace(logprobs=np.zeros(shape, "float32"))
    if sampling.logprobs:
        number = max(MIN_TOP_LOGPROBS, 1 << (sampling.logprobs - 1).bit_length())
        top_shape = (*shape, min(number, vocabulary_size))
        state = state._replace(
            top_tokens=np.zeros(top_shape, "int32"),
            top_logprobs=np.zeros(top_shape, "float32"),
        )
    return SamplingInputs(arrays, uniforms), state


def sample_tokens(
    logits: Tensor, inputs: SamplingInputs, state: SamplingState, step: Tensor | int
) -> tuple[Tensor, SamplingState]:
    """Chooses the next token of each sequence.

    Args:
        logits: float32 `(batch, vocabulary_size)`.
        inputs: the inputs.
        state: the state.
        step: int scalar, how many tokens were generated before.

    Returns:
        int32 `(batch,)`, the tokens, and the new state.
    """
    number = None if isinstance(state.logprobs, tuple) else 0
    if not isinstance(state.top_tokens, tuple):
        number = state.top_tokens.shape[-1]
    uniforms = ops.take(inputs.uniforms, step, axis=1)
    chosen = choose_tokens(logits, inputs.arrays, state.counts, uniforms, step, number)
    state = SamplingState(
        count_tokens(state.counts, chosen.tokens),
        *(
            _with_step(record, new, step)
            for record, new in zip(state[1:], chosen[1:], strict=True)
        ),
    )
    return chosen.tokens, state


def _with_step(record, new, step):
    if isinstance(record, tuple):  # Not wanted.
        return record
    start = (0, step, 0)[: len(record.shape)]
    return ops.slice_update(record, start, new[:, None])


def recorded_logprobs(
    state: SamplingState | tuple[()], number: int | None
) -> Callable[[int, int, list[int]], NewTokens]:
    """Copies log-probabilities to the host.

    Args:
        state: the state; `()` has none.
        number: `BatchSampling.logprobs`.

    Returns:
        A function of a sequence's number, the step of its first token, and its tokens.
        It returns these tokens with their log-probabilities.

    Example:
        >>> recorded_logprobs((), None)(0, 5, [357, 1239])
        NewTokens(ids=[357, 1239], logprobs=(), top_logprobs=())
    """
    if number is None:
        return lambda row, step, ids: NewTokens(ids)
    logprobs = to_numpy(state.logprobs)
    if number:
        top_tokens, top_logprobs = map(to_numpy, state[2:])

    def new_tokens(row, step, ids):
        steps = range(step, step + len(ids))
        tops = [{} for _ in steps]
        if number:
            pairs = (
                zip(top_tokens[row, i, :number], top_logprobs[row, i], strict=False)
                for i in steps
            )
            tops = [{int(k): float(value) for k, value in pair} for pair in pairs]
        return NewTokens(ids, logprobs[row, list(steps)].tolist(), tops)

    return new_tokens
