"""The KV cache, and the generation loop that samples one token per step.

All tokens of a prompt except the last, its prefix, are written to the cache first
(prefill). Each decoding step then feeds one token per sequence, beginning with the last
token of the prompt, and samples the next one.

All sequences share the columns of the cache. Prefixes fill them from the left; shorter
ones leave a gap, which is masked. The token that is fed in step `s` is written to
column `start + s` in every sequence, where `start` is the length of the longest prefix.
So each step updates a single slice, whatever the lengths of the prompts. Rotary
positions are those of the sequence itself, so the result for a prompt does not depend
on the other prompts.

The cache is a tuple with a pair of tensors (keys, values) for each layer. Each has
shape `(num_key_value_heads * batch, columns, head_dim)`. In each step, XLA reuses the
donated buffers, and PyTorch writes in place; see `layers/cached_attention.py`.

With XLA, prefill and decoding are one compiled program for each batch size and number
of columns. Both are rounded up to few different values, and prefixes are fed in as many
chunks as needed.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import keras
import numpy as np
from keras import ops, tree

from keras_openllama.backend.arrays import to_numpy
from keras_openllama.backend.jit import compile_function, while_loop
from keras_openllama.backend.keras_hub import GreedySampler, RandomSampler, TopPSampler
from keras_openllama.generation.sharding import (
    constrain_sharding,
    device_platform,
    sharded_zeros,
    state_shardings,
    to_device,
)
from keras_openllama.layers.cached_attention import MASKED_SCORE
from keras_openllama.text.token_arrays import PAD_TOKEN_ID, pad_sequences
from keras_openllama.utils.types import Tensor

if TYPE_CHECKING:
    from keras_openllama.backend.keras_hub import Backbone, CausalLM, Sampler

# Heuristic: with fewer columns, the weights dominate memory and time.
MIN_CACHE_LENGTH = 256
# Heuristic: stop ids are padded to a multiple of 4, so that few shapes are compiled.
STOP_IDS_MULTIPLE = 4


def padded_cache_length(columns: int) -> int:
    """Rounds up to a power of two, so that few shapes are compiled.

    Args:
        columns: number of columns that are needed.

    Returns:
        The next power of two, at least 256.

    Example:
        >>> [padded_cache_length(n) for n in (2, 256, 257)]
        [256, 256, 512]
    """
    return max(MIN_CACHE_LENGTH, 1 << (columns - 1).bit_length())


def padded_batch_size(batch: int) -> int:
    """Rounds up to a power of two, so that few shapes are compiled.

    Args:
        batch: number of sequences.

    Returns:
        1, or the next power of two that is at least 4.

    Example:
        >>> [padded_batch_size(n) for n in (1, 2, 5)]
        [1, 4, 8]
    """
    return 1 if batch == 1 else max(4, 1 << (batch - 1).bit_length())


def prefill_chunks(platform: str, batch: int, columns: int) -> list[int]:
    """Returns the sizes of the chunks in which prefixes are written to the cache.

    On a CPU, chunks of 256 tokens are near the peak rate of matrix products, and a
    chunk of 32 takes about as long as two decoding steps. An accelerator reads the
    weights in the time in which it computes about 256 tokens of the whole batch, so
    smaller chunks are not faster. Larger chunks are faster; memory for attention scores
    limits them.

    Args:
        platform: platform of the devices, such as `"cpu"`.
        batch: batch size of the program, a power of two.
        columns: columns of the cache, a power of two.

    Returns:
        Chunk sizes below `columns`, descending; `[columns]` if none is. Each divides
        `columns`.

    Example:
        >>> prefill_chunks("cpu", batch=1, columns=2048)
        [256, 32]
        >>> prefill_chunks("gpu", batch=4, columns=2048)
        [1024, 256, 64]
    """
    if platform == "cpu":
        sizes = {256, 32}
    else:
        sizes = {max(256, min(1024, 8192 // batch)), 256, max(32, 256 // batch)}
    fitting = [size for size in sizes if size < columns]
    return sorted(fitting, reverse=True) or [columns]


def forward_with_cache(
    backbone: Backbone,
    tokens: Tensor,
    prompt_layout: dict[str, Tensor],
    cache: Any,
    column: Tensor,
) -> tuple[Tensor, Any]:
    """Writes tokens to the cache and computes their hidden states.

    Args:
        backbone: `OpenLlamaBackbone`.
        tokens: int `(batch, length)`, one token per sequence or a chunk of the
            prefixes.
        prompt_layout: dict of `"prefix_lengths"` and `"final_lengths"`, int `(batch,)`
            or `(1,)`, and `"start"`, int scalar; see the module docstring.
        cache: the KV cache, see the module docstring.
        column: int scalar, the column of the first of these tokens.

    Returns:
        Hidden states after the final norm, `(batch, length, hidden_dim)`, and the
        cache.
    """
    used = used_columns(cache, column + tokens.shape[1])
    positions, bias = positions_and_bias(
        prompt_layout, column, tokens.shape, used[0][0].shape
    )
    hidden, used = run_layers(
        backbone, tokens, positions, prompt_layout["final_lengths"], bias, used, column
    )
    return hidden, cache if keras.config.backend() == "torch" else used


def used_columns(cache: Any, end: Tensor | int) -> Any:
    """Returns the part of the cache that attention reads.

    Args:
        cache: the KV cache.
        end: int scalar, the number of columns in use.

    Returns:
        The whole cache with XLA, whose shapes are static; on PyTorch, views of the
        first columns.
    """
    if keras.config.backend() == "torch":
        return tuple(tuple(x[:, : int(end)] for x in pair) for pair in cache)
    return cache


def positions_and_bias(
    prompt_layout: dict[str, Tensor],
    column: Tensor,
    shape: Sequence[int],
    cache_shape: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """Computes rotary positions and the attention bias of tokens.

    Args:
        prompt_layout: see `forward_with_cache`.
        column: see `forward_with_cache`.
        shape: `(batch, length)` of the tokens.
        cache_shape: shape of the keys in the cache.

    Returns:
        The positions, int `(batch, length)`; and the `bias` of
        `cached_attention.attend_cached`, which masks the columns that are invisible to
        a token.

    Example:
        >>> prompt_layout = {"prefix_lengths": np.array([1, 3]), "start": 3}
        >>> positions, bias = positions_and_bias(prompt_layout, 3, (2, 1), (2, 4, 8))
        >>> positions
        Array([[1],
               [3]], dtype=int32)
        >>> (bias[:, 0] == 0).tolist()  # The shorter prefix has a gap.
        [[True, False, False, True], [True, True, True, True]]
    """
    prefix, start = prompt_layout["prefix_lengths"][:, None], prompt_layout["start"]
    columns = (column + ops.arange(shape[1], dtype="int32"))[None]
    positions = ops.where(columns < start, columns, prefix + columns - start)
    keys = ops.arange(cache_shape[1], dtype="int32")[None]
    filled = ops.logical_or(keys < prefix, keys >= start)[:, None]
    visible = ops.logical_and(filled, keys[:, None] <= columns[:, :, None])
    bias = ops.where(visible, 0.0, MASKED_SCORE)
    repeats = cache_shape[0] // bias.shape[0]  # Heads, and beams of one sequence.
    return ops.broadcast_to(positions, shape), ops.tile(bias, (repeats, 1, 1))


def run_layers(
    backbone: Backbone,
    tokens: Tensor,
    positions: Tensor,
    final_lengths: Tensor,
    bias: Tensor | None,
    cache: Any,
    column: Tensor | None,
) -> tuple[Tensor, Any]:
    """Runs all layers on tokens, with the KV cache.

    Args:
        backbone: `OpenLlamaBackbone`.
        tokens: int `(batch, length)`.
        positions: int `(batch, length)`, rotary positions.
        final_lengths: int `(batch,)`, lengths of the sequences after generation, on
            which dynamic RoPE scaling depends.
        bias: see `positions_and_bias`; `None` is causal attention over `tokens`.
        cache: the KV cache, or the used part of it.
        column: int scalar, the column of the first token; unused on PyTorch.

    Returns:
        Hidden states after the final norm, `(batch, length, hidden_dim)`, and the
        updated cache.
    """
    cos, sin = backbone.rotary_embedding(positions, final_lengths)
    x = backbone.token_embedding(tokens)
    new_cache = []
    for layer, key_value in zip(backbone.transformer_layers, cache, strict=True):
        x, key_value = layer(x, cos, sin, bias, cache=key_value, column=column)
        new_cache.append(tuple(key_value))
    return backbone.final_norm(x), tuple(new_cache)


def init_cache(backbone: Backbone, batch: int, columns: int) -> Any:
    """Creates an empty KV cache.

    Args:
        backbone: `OpenLlamaBackbone`.
        batch: number of sequences.
        columns: number of columns.

    Returns:
        For each layer a pair of zeros `(num_key_value_heads * batch, columns,
        head_dim)`, in the compute dtype.

    Example:
        >>> cache = init_cache(lm.backbone, batch=3, columns=256)
        >>> len(cache), cache[0][0].shape
        (4, (6, 256, 64))
    """
    shape = (backbone.num_key_value_heads * batch, columns, backbone.head_dim)
    dtype = backbone.compute_dtype
    if keras.config.backend() == "jax":
        make = functools.partial(sharded_zeros, shape, dtype, backbone)
    else:
        make = functools.partial(ops.zeros, shape, dtype)
    return tuple((make(), make()) for _ in backbone.transformer_layers)


def is_any_of(tokens: Tensor, stop_ids: Tensor) -> Tensor:
    """Returns which tokens are among the stop ids.

    Args:
        tokens: int `(batch,)`.
        stop_ids: int `(number,)`.

    Returns:
        bool `(batch,)`.

    Example:
        >>> is_any_of(np.array([5, 2]), np.array([2, 13]))
        Array([False,  True], dtype=bool)
    """
    return ops.any(ops.equal(tokens[:, None], stop_ids), axis=-1)


def keeps_every_token(sampler: Sampler) -> bool:
    """Returns whether a top-p sampler does not exclude any token.

    KerasHub's `TopPSampler(p=1)` still excludes tokens once the cumulative probability
    exceeds 1 by rounding.

    Args:
        sampler: a KerasHub sampler.

    Returns:
        True for a top-p sampler with `p >= 1` and no `k`.

    Example:
        >>> keeps_every_token(TopPSampler(p=1.0)), keeps_every_token(TopPSampler(p=0.9))
        (True, False)
    """
    return type(sampler) is TopPSampler and sampler.k is None and sampler.p >= 1


class TokenLoop:
    """Generates one token per step: greedy, random, top-k, top-p and similar sampling.

    `start` puts the prompts on the device; `advance` generates up to a given step, or
    until all sequences have ended. The state is a dict of tensors that stays on the
    device: `tokens` `(batch, columns)`, `num_prefilled` and `step` (int scalars),
    `done` `(batch,)`, and `cache`.

    Args:
        model: `OpenLlamaCausalLM`.

    Example:
        >>> loop = TokenLoop(lm)
        >>> state, prompt_layout = loop.start([[1, 357, 1239]], limits=[4])
        >>> state = loop.advance(
        ...     state=state,
        ...     prompt_layout=prompt_layout,
        ...     stop_ids=np.array([2]),
        ...     until=np.int32(4),
        ... )
        >>> lm.preprocessor.tokenizer.detokenize(state["tokens"][0, :7])
        'The sea shines, and'
    """

    def __init__(self, model: CausalLM):
        self.model = model
        self.advance = compile_function(self._advance, model, donate=("state",))

    def start(
        self, prompts: list[list[int]], limits: list[int]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Creates the initial state.

        Args:
            prompts: token ids of each prompt, at least one per prompt.
            limits: maximum number of new tokens for each prompt.

        Returns:
            The state, and the `prompt_layout` of `forward_with_cache` with the limits.
        """
        longest = max(map(len, prompts))
        columns = padded_cache_length(longest + max(limits))
        filler = padded_batch_size(len(prompts)) - len(prompts)
        tokens, prompt_layout = pad_prompts(
            prompts + [[PAD_TOKEN_ID]] * filler, limits + [0] * filler, columns
        )
        state = {
            "tokens": tokens,
            "num_prefilled": np.int32(0),
            "step": np.int32(0),
            "done": prompt_layout["limits"] == 0,
        }
        replicated = state_shardings(self.model.backbone)[1]
        state, prompt_layout = tree.map_structure(
            lambda x: to_device(x, replicated), (state, prompt_layout)
        )
        state["cache"] = init_cache(
            self.model.backbone, len(prompt_layout["limits"]), columns
        )
        return state, prompt_layout

    def _advance(self, state, prompt_layout, stop_ids, until):
        state = self._with_sharding(state)
        # On TensorFlow, chunk sizes were measured on CPUs only.
        on_jax = keras.config.backend() == "jax"
        platform = device_platform(self.model.backbone) if on_jax else "cpu"
        chunks = prefill_chunks(platform, *state["tokens"].shape)
        for chunk in chunks:
            state = self._prefill(
                state, prompt_layout, chunk, is_last=chunk == chunks[-1]
            )

        def is_running(state):
            return ops.logical_and(
                state["step"] < until, ops.logical_not(ops.all(state["done"]))
            )

        def step(state):
            column = prompt_layout["start"] + state["step"]
            inputs = ops.take(state["tokens"], column, axis=1)[:, None]
            hidden, cache = forward_with_cache(
                self.model.backbone, inputs, prompt_layout, state["cache"], column
            )
            logits = self.model.lm_head(hidden)[:, 0]
            return self.sample_next(
                {**state, "cache": cache}, logits, prompt_layout, stop_ids
            )

        return self._with_sharding(while_loop(self.model, is_running, step, state))

    def _with_sharding(self, state):
        cache_sharding, replicated = state_shardings(self.model.backbone)
        rest = {name: value for name, value in state.items() if name != "cache"}
        return {
            **constrain_sharding(rest, replicated),
            "cache": constrain_sharding(state["cache"], cache_sharding),
        }

    def _prefill(self, state, prompt_layout, chunk, is_last):
        """Feeds the prefixes in chunks; the last chunk may extend beyond their end."""
        backbone, overshoot = self.model.backbone, 0 if is_last else chunk - 1

        def is_running(state):
            return state["num_prefilled"] + overshoot < prompt_layout["start"]

        def feed_chunk(state):
            column = state["num_prefilled"]
            shape = (state["tokens"].shape[0], chunk)
            tokens = ops.slice(state["tokens"], (0, column), shape)
            _, cache = forward_with_cache(
                backbone, tokens, prompt_layout, state["cache"], column
            )
            return {**state, "cache": cache, "num_prefilled": column + chunk}

        return while_loop(self.model, is_running, feed_chunk, state)

    def sample_next(
        self,
        state: dict[str, Any],
        logits: Tensor,
        prompt_layout: dict[str, Any],
        stop_ids: Tensor,
    ) -> dict[str, Any]:
        """Samples the next token of each sequence and appends it.

        Args:
            state: the state of the loop.
            logits: `(batch, vocabulary_size)`.
            prompt_layout: second result of `start`.
            stop_ids: int `(number,)`, padded with -1.

        Returns:
            The state after the step.
        """
        sampler, logits = self.model.sampler, ops.cast(logits, "float32")
        if type(sampler) is GreedySampler:
            token = ops.argmax(logits, axis=-1)
        else:
            probabilities = sampler.compute_probabilities(logits)
            if keeps_every_token(sampler):
                token = RandomSampler.get_next_token(sampler, probabilities)
            else:
                token = sampler.get_next_token(probabilities)
        token = ops.where(state["done"], PAD_TOKEN_ID, ops.cast(token, "int32"))
        step = state["step"] + 1
        done = ops.logical_or(
            is_any_of(token, stop_ids), step >= prompt_layout["limits"]
        )
        return {
            **state,
            "tokens": ops.slice_update(
                state["tokens"],
                (0, prompt_layout["start"] + step),
                ops.cast(token, "int32")[:, None],
            ),
            "step": step,
            "done": ops.logical_or(state["done"], done),
        }


def pad_prompts(
    prompts: list[list[int]], limits: list[int], columns: int
) -> tuple[np.ndarray, dict[str, Any]]:
    """Arranges prompts in an array as the loop expects them.

    The last token of each prompt is in the first column after the longest prefix.

    Args:
        prompts: token ids of each prompt, at least one per prompt.
        limits: maximum number of new tokens for each prompt.
        columns: number of columns.

    Returns:
        Token ids, int32 `(batch, columns)`, and the `prompt_layout` of
        `forward_with_cache` with `"limits"`.

    Example:
        >>> tokens, prompt_layout = pad_prompts([[1, 5, 6], [1, 7]], [2, 2], columns=5)
        >>> tokens
        array([[1, 5, 6, 0, 0],
               [1, 0, 7, 0, 0]], dtype=int32)
        >>> prompt_layout["prefix_lengths"]
        array([2, 1], dtype=int32)
    """
    prompt_lengths = np.array([len(prompt) for prompt in prompts], "int32")
    limits = np.array(limits, "int32")
    start = prompt_lengths.max() - 1
    tokens = pad_sequences([prompt[:-1] for prompt in prompts], columns)["token_ids"]
    tokens[:, start] = [prompt[-1] for prompt in prompts]
    prompt_layout = {
        "prefix_lengths": prompt_lengths - 1,
        "final_lengths": prompt_lengths + limits,
        "limits": limits,
        "start": start,
    }
    return tokens, prompt_layout


def sample_tokens(
    loop: TokenLoop,
    prompts: list[list[int]],
    limits: list[int],
    stop_token_ids: Sequence[int],
    stride: int | None = None,
) -> Iterator[list[list[int]]]:
    """Runs a `TokenLoop` on prompts and yields the new tokens.

    Args:
        loop: the loop.
        prompts: token ids of each prompt, at least one per prompt.
        limits: maximum number of new tokens for each prompt.
        stop_token_ids: ids that end a sequence.
        stride: tokens per sequence between two yields; `None` yields once, at the end.

    Yields:
        For each prompt, its new tokens since the previous yield, including the stop id.

    Example:
        >>> [new_tokens] = sample_tokens(TokenLoop(lm), [[1, 357, 1239]], [4], [2])
        >>> len(new_tokens[0])
        4
    """
    state, prompt_layout = loop.start(prompts, limits)
    multiples = max(1, -(-len(stop_token_ids) // STOP_IDS_MULTIPLE))
    stop_ids = np.full(multiples * STOP_IDS_MULTIPLE, -1, "int32")  # No token is -1.
    stop_ids[: len(stop_token_ids)] = stop_token_ids
    stop_ids = to_device(stop_ids, state_shardings(loop.model.backbone)[1])
    first = max(map(len, prompts))
    seen = 0
    running = [limit > 0 for limit in limits]
    while any(running):
        until = min(max(limits), seen + (stride or max(limits)))
        state = loop.advance(
            state=state,
            prompt_layout=prompt_layout,
            stop_ids=stop_ids,
            until=np.int32(until),
        )
        step = int(state["step"])
        tokens = to_numpy(state["tokens"])[: len(prompts)]
        new = tokens[:, first + seen : first + step].tolist()
        for i, limit in enumerate(limits):
            ids = cut_at_stop_id(new[i][: max(0, limit - seen)], stop_token_ids)
            new[i] = ids if running[i] else []
            stopped = bool(ids) and ids[-1] in stop_token_ids
            running[i] = running[i] and not stopped and step < limit
        yield new
        seen = step


def cut_at_stop_id(ids: list[int], stop_token_ids: Sequence[int]) -> list[int]:
    """Returns the tokens up to and including the first stop id.

    Args:
        ids: token ids.
        stop_token_ids: ids that end a sequence.

    Returns:
        A part of `ids`, or all of them.

    Example:
        >>> cut_at_stop_id([5, 2, 7], [2])
        [5, 2]
    """
    ends = [i + 1 for i, token_id in enumerate(ids) if token_id in stop_token_ids]
    return ids[: min(ends, default=len(ids))]
