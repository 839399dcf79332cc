"""The controls of the sequences of a batch as arrays, and their random numbers.

Both are made on the host, with NumPy: they are inputs of the compiled program.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from keras_openllama.generation.sampling.config import SamplingConfig
from keras_openllama.utils.types import Tensor
from keras_openllama.utils.validation import check_integer


class SamplingArrays(NamedTuple):
    """The controls of the sequences of a batch, from `sampling_arrays`.

    Attributes:
        temperature: float32 `(batch,)`; 0 is greedy.
        top_k: int32 `(batch,)`, at most the vocabulary size.
        top_p: float32 `(batch,)`.
        min_p: float32 `(batch,)`.
        repetition_penalty: float32 `(batch,)`.
        presence_penalty: float32 `(batch,)`.
        frequency_penalty: float32 `(batch,)`.
        min_new_tokens: int32 `(batch,)`.
        bias: float32 `(batch, vocabulary_size)`, added to the logits; minus infinity
            for banned tokens.
        is_stop: bool `(batch, vocabulary_size)`, which tokens end the sequence.
        in_prompt: bool `(batch, vocabulary_size)`, which tokens the prompt contains.
    """

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    repetition_penalty: Tensor
    presence_penalty: Tensor
    frequency_penalty: Tensor
    min_new_tokens: Tensor
    bias: Tensor
    is_stop: Tensor
    in_prompt: Tensor


def sampling_arrays(
    configs: Sequence[SamplingConfig],
    prompts: Sequence[Sequence[int]],
    vocabulary_size: int,
    stop_token_ids: Sequence[int] = (),
) -> SamplingArrays:
    """Arranges the controls of sequences in arrays.

    Args:
        configs: the controls of each sequence.
        prompts: token ids of each prompt.
        vocabulary_size: number of tokens.
        stop_token_ids: ids that end a sequence, for `min_new_tokens`.

    Returns:
        NumPy arrays, a row for each sequence.

    Raises:
        ValueError: for token ids outside of the vocabulary, or if all tokens are
            banned.

    Example:
        >>> configs = [SamplingConfig(temperature=0), SamplingConfig(top_k=5)]
        >>> arrays = sampling_arrays(configs, [[1, 7], [1]], vocabulary_size=10)
        >>> arrays.temperature, arrays.top_k
        (array([0., 1.], dtype=float32), array([10,  5], dtype=int32))
    """
    shape = (len(configs), vocabulary_size)
    bias = np.zeros(shape, "float32")
    is_stop = np.zeros(shape, "bool")
    in_prompt = np.zeros(shape, "bool")
    is_stop[:, list(stop_token_ids)] = True
    for row, (config, prompt) in enumerate(zip(configs, prompts, strict=True)):
        in_prompt[row, prompt] = True
        check_vocabulary(config, vocabulary_size)
        bias[row, list(config.logit_bias)] = list(config.logit_bias.values())
        bias[row, list(config.banned_tokens)] = -np.inf
        never = np.isneginf(bias[row]) | (is_stop[row] & (config.min_new_tokens > 0))
        if never.all():
            raise ValueError(
                "`banned_tokens` and `min_new_tokens` exclude every token of the "
                f"vocabulary of {vocabulary_size}. Ban fewer. Received: "
                f"{len(config.banned_tokens)} banned tokens, "
                f"min_new_tokens={config.min_new_tokens}"
            )

    def values(name, dtype="float32"):
        return np.array([getattr(config, name) for config in configs], dtype)

    is_greedy = values("is_greedy", "bool")
    size = vocabulary_size
    return SamplingArrays(
        temperature=np.where(is_greedy, np.float32(0), values("temperature")),
        top_k=np.array([min(c.top_k or size, size) for c in configs], "int32"),
        top_p=values("top_p"),
        min_p=values("min_p"),
        repetition_penalty=values("repetition_penalty"),
        presence_penalty=values("presence_penalty"),
        frequency_penalty=values("frequency_penalty"),
        min_new_tokens=values("min_new_tokens", "int32"),
        bias=bias,
        is_stop=is_stop,
        in_prompt=in_prompt,
    )


def check_vocabulary(config: SamplingConfig, vocabulary_size: int) -> None:
    """Checks the token ids of a configuration.

    Args:
        config: the configuration.
        vocabulary_size: number of tokens.

    Raises:
        ValueError: for an id outside of the vocabulary.

    Example:
        >>> check_vocabulary(SamplingConfig(banned_tokens=[5]), vocabulary_size=6)
    """
    for name in ("logit_bias", "banned_tokens"):
        for token in getattr(config, name):
            check_integer(name, token, least=0, most=vocabulary_size - 1)


def resolve_seed(seed: int | None) -> int:
    """Returns a seed, or draws one from Python's `random`.

    Args:
        seed: `SamplingConfig.seed`.

    Returns:
        An integer.

    Example:
        >>> resolve_seed(7)
        7
    """
    return random.getrandbits(64) if seed is None else seed


def uniform_numbers(seed: int, sample: int, count: int) -> np.ndarray:
    """Draws the random numbers of a sequence, one for each new token.

    Args:
        seed: the seed of the request, from -2**63 to 2**64 - 1.
        sample: number of the sequence among those of the request, from 0.
        count: how many numbers. Fewer are the first of more.

    Returns:
        float32 `(count,)`, at least 0 and less than 1.

    Example:
        >>> uniform_numbers(1, sample=0, count=2)
        array([0.303568  , 0.84870875], dtype=float32)

    Source: Philox, Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011.
    """
    key = np.array([seed % 2**64, sample], "uint64")
    bits = np.random.Philox(key=key).random_raw(count)
    # 24 bits are exact in float32, so that no number is rounded to 1.
    return ((bits >> np.uint64(40)) * 2.0**-24).astype("float32")
