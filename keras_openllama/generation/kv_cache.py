"""The KV cache: its columns, and the forward pass that fills and reads it.

All sequences share the columns of the cache. The tokens of a prompt except the last,
its prefix, fill them from the left; shorter prefixes leave a gap, which is masked. The
token that decoding step `s` feeds is written to column `start + s` in every sequence,
where `start` is the length of the longest prefix. So each step updates a single slice,
whatever the lengths of the prompts. Rotary positions are those of the sequence itself,
so the result for a prompt does not depend on the other prompts.

The cache has a tuple of tensors for each layer: keys and values, of shape
`(num_key_value_heads * batch, columns, head_dim)`; and if these are int8, the scales of
both, `(num_key_value_heads * batch, columns)`. In each step, XLA reuses the donated
buffers, and PyTorch writes in place; see `layers/cached_attention.py` and
`layers/quantized_cache.py`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import keras
import numpy as np
from keras import ops

from keras_openllama.generation.sharding import sharded_zeros
from keras_openllama.layers.cached_attention import MASKED_SCORE
from keras_openllama.text.token_arrays import pad_sequences
from keras_openllama.utils.types import Tensor

if TYPE_CHECKING:
    from keras_openllama.backend.keras_hub import Backbone

# Heuristic: with fewer columns, the weights dominate memory and time.
MIN_CACHE_LENGTH = 256
# Values of `kv_cache_dtype`, see `OpenLlamaCausalLM.compile`.
CACHE_DTYPES = (None, "int8")
# Heuristic: most tokens that `SlotDecoder.verify` takes. Reading the weights takes
# longer than the products with so many.
MAX_VERIFIED = 16


class PromptLayout(NamedTuple):
    """Where the prompts of a batch are in the columns of the cache.

    Attributes:
        prefix_lengths: int `(batch,)`, lengths of the prompts without their last token.
        start: int scalar, the column after the longest prefix.
        limits: int `(batch,)`, maximum number of new tokens.
        final_lengths: int `(batch,)`, lengths of the sequences after generation, on
            which dynamic RoPE scaling depends. With one prompt and several beams, all
            arrays are of shape `(1,)`.
    """

    prefix_lengths: Tensor
    start: Tensor | int
    limits: Tensor
    final_lengths: Tensor


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


def pad_prompts(
    prompts: list[list[int]], limits: list[int], columns: int
) -> tuple[np.ndarray, PromptLayout]:
    """Arranges prompts in an array as the loop expects them.

    The last token of each prompt is in the first column after the longest prefix.

    Args:
        prompts: token ids of each prompt, at least one per prompt.
        limits: maximum number of new tokens for each prompt.
        columns: number of columns.

    Returns:
        Token ids, int32 `(batch, columns)`, and where the prompts are in them.

    Example:
        >>> tokens, prompt_layout = pad_prompts([[1, 5, 6], [1, 7]], [2, 2], columns=5)
        >>> tokens
        array([[1, 5, 6, 0, 0],
               [1, 0, 7, 0, 0]], dtype=int32)
        >>> prompt_layout.prefix_lengths
        array([2, 1], dtype=int32)
    """
    prompt_lengths = np.array([len(prompt) for prompt in prompts], "int32")
    limits = np.array(limits, "int32")
    start = prompt_lengths.max() - 1
    tokens = pad_sequences([prompt[:-1] for prompt in prompts], columns)["token_ids"]
    tokens[:, start] = [prompt[-1] for prompt in prompts]
    return tokens, PromptLayout(
        prefix_lengths=prompt_lengths - 1,
        start=start,
        limits=limits,
        final_lengths=prompt_lengths + limits,
    )


def check_cache_dtype(dtype: str | None) -> None:
    """Checks the argument `kv_cache_dtype`.

    Args:
        dtype: a value of `CACHE_DTYPES`.

    Raises:
        ValueError: for any other value.

    Example:
        >>> check_cache_dtype("int8")
    """
    if dtype not in CACHE_DTYPES:
        raise ValueError(
            "`kv_cache_dtype` must be None, for the dtype that suits the model, or "
            f"'int8'. Received: kv_cache_dtype={dtype!r}"
        )


def init_cache(
    backbone: Backbone, batch: int, columns: int, dtype: str | None = None
) -> Any:
    """Creates an empty KV cache.

    Args:
        backbone: `OpenLlamaBackbone`.
        batch: number of sequences.
        columns: number of columns.
        dtype: `None` for the compute dtype, or `"int8"`.

    Returns:
        For each layer a tuple of zeros, see the module's documentation.

    Example:
        >>> cache = init_cache(lm.backbone, batch=3, columns=256)
        >>> len(cache), cache[0][0].shape
        (4, (6, 256, 64))
        >>> cache = init_cache(lm.backbone, batch=3, columns=256, dtype="int8")
        >>> [(x.dtype.name, x.shape) for x in cache[0][1:3]]
        [('int8', (6, 256, 64)), ('float32', (6, 256))]
    """
    shape = (backbone.num_key_value_heads * batch, columns, backbone.head_dim)
    tensors = [(shape, dtype or backbone.compute_dtype)] * 2
    if dtype == "int8":
        tensors += [(shape[:2], "float32")] * 2
    make = ops.zeros
    if keras.config.backend() == "jax":
        make = functools.partial(sharded_zeros, backbone=backbone)
    return tuple(
        tuple(make(*tensor) for tensor in tensors) for _ in backbone.transformer_layers
    )


def forward_with_cache(
    backbone: Backbone,
    tokens: Tensor,
    prompt_layout: PromptLayout,
    cache: Any,
    column: Tensor,
    prefill_attention: Callable[..., Tensor] | None = None,
) -> tuple[Tensor, Any]:
    """Writes tokens to the cache and computes their hidden states.

    Args:
        backbone: `OpenLlamaBackbone`.
        tokens: int `(batch, length)`, one token per sequence or a chunk of the
            prefixes.
        prompt_layout: where the prompts are.
        cache: the KV cache, see the module docstring.
        column: int scalar, the column of the first of these tokens.
        prefill_attention: callable of `attention_kernels.select_prefill_attention`, for
            the first chunk only. It needs no mask: no token sees the gaps, which are
            later columns of the chunk. `None` attends to the cache.

    Returns:
        Hidden states after the final norm, `(batch, length, hidden_dim)`, and the
        cache.
    """
    used = used_columns(cache, column + tokens.shape[1])
    positions, bias = positions_and_bias(
        prompt_layout, column, tokens.shape, used[0][0].shape
    )
    options = {}
    if prefill_attention is not None:
        bias, options = None, {"prefill_attention": prefill_attention}
    hidden, used = run_layers(
        *(backbone, tokens, positions, prompt_layout.final_lengths),
        *(bias, used, column),
        **options,
    )
    return hidden, cache if keras.config.backend() == "torch" else used


def used_columns(cache: Any, end: Tensor | int) -> Any:
    """Returns the part of the cache that attention reads.

    On PyTorch, where shapes are dynamic, it is a view whose last columns are those of
    the tokens that are being fed: `cached_attention.update_cache` writes them there, in
    place, and so into the whole cache.

    Args:
        cache: the KV cache.
        end: int scalar, the number of columns in use.

    Returns:
        The whole cache with XLA, whose shapes are static; on PyTorch, views of the
        first columns.
    """
    if keras.config.backend() == "torch":
        return tuple(tuple(x[:, : int(end)] for x in layer) for layer in cache)
    return cache


def positions_and_bias(
    prompt_layout: PromptLayout,
    column: Tensor,
    shape: Sequence[int],
    cache_shape: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """Computes rotary positions and the attention bias of tokens.

    Args:
        prompt_layout: where the prompts are.
        column: see `forward_with_cache`.
        shape: `(batch, length)` of the tokens.
        cache_shape: shape of the keys in the cache.

    Returns:
        The positions, int `(batch, length)`; and the `bias` of
        `cached_attention.attend_cached`, which masks the columns that are invisible to
        a token.

    Example:
        >>> _, prompt_layout = pad_prompts([[1, 5], [1, 5, 6, 7]], [2, 2], columns=8)
        >>> positions, bias = positions_and_bias(prompt_layout, 3, (2, 1), (2, 4, 8))
        >>> positions
        Array([[1],
               [3]], dtype=int32)
        >>> (bias[:, 0] == 0).tolist()  # The shorter prefix has a gap.
        [[True, False, False, True], [True, True, True, True]]
    """
    prefix, start = prompt_layout.prefix_lengths[:, None], prompt_layout.start
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
    **options: Any,
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
        **options: further arguments of `DecoderLayer`.

    Returns:
        Hidden states after the final norm, `(batch, length, hidden_dim)`, and the
        updated cache.
    """
    cos, sin = backbone.rotary_embedding(positions, final_lengths)
    x = backbone.token_embedding(tokens)
    new_cache = []
    for layer, tensors in zip(backbone.transformer_layers, cache, strict=True):
        x, tensors = layer(x, cos, sin, bias, cache=tensors, column=column, **options)
        new_cache.append(tuple(tensors))
    return backbone.final_norm(x), tuple(new_cache)
