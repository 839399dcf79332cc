"""Attention over a KV cache, for prefill and decoding."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from keras_openllama.utils.types import Tensor

if keras.config.backend() == "jax":
    import jax

# Factors of keys and values, or none; see `attend_cached`.
Scales = Sequence[Tensor]
# Score of a masked key. It is finite, so that a query without any visible key (padding)
# does not become NaN.
MASKED_SCORE = -1e30
# Heuristic: columns of the cache per block of blockwise attention on a CPU.
CACHE_BLOCK = 256
# Block sizes on accelerators, largest first: loop overhead dominates small blocks.
ACCELERATOR_BLOCKS = 1024, 512
# Largest number of float32 scores per block (1 GiB).
MAX_BLOCK_SCORES = 1 << 28


def attend_cached(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scales: Scales = ()
) -> Tensor:
    """Attention over a whole cache, in a layout for which no backend copies the cache.

    Heads and sequences share one axis, since XLA on a CPU otherwise copies the whole
    cache in each step. For grouped-query attention, the query heads of a key/value head
    are folded into the length axis.

    Args:
        query: Float tensor `(batch, num_query_heads, length, head_dim)`.
        key: Tensor `(num_key_value_heads * batch, columns, head_dim)`: float, or the
            integers of `quantized_cache`.
        value: Tensor of the shape and dtype of `key`.
        bias: float32 tensor `(num_key_value_heads * batch, length, columns)`: 0 where
            a query may attend to a key, `MASKED_SCORE` elsewhere.
        scales: Factors of the keys and of the values, float32
            `(num_key_value_heads * batch, columns)`, or empty.

    Returns:
        Tensor `(batch, num_query_heads, length, head_dim)` with the dtype of `query`.

    Example:
        >>> query = ops.ones((2, 4, 1, 8))
        >>> cache = ops.ones((2 * 2, 16, 8))  # Two key/value heads, two sequences.
        >>> attend_cached(query, cache, cache, ops.zeros((4, 1, 16))).shape
        (2, 4, 1, 8)
    """
    folded = fold_query_groups(query, key)
    context = attend_folded(folded, key, value, bias, scales)
    return unfold_query_groups(context, query.shape)


def attend_folded(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scales: Scales = ()
) -> Tensor:
    """`attend_cached` for queries in the layout of `fold_query_groups`.

    Scores are computed as `key @ query.T`: `query @ key.T` reaches only a tenth of the
    memory bandwidth.

    Args:
        query: Float tensor `(num_key_value_heads * batch, group * length, head_dim)`.
        key: See `attend_cached`.
        value: See `attend_cached`.
        bias: See `attend_cached`.
        scales: See `attend_cached`.

    Returns:
        Tensor of the shape and dtype of `query`.
    """
    _, queries, head_dim = query.shape
    key, value = (ops.cast(x, query.dtype) for x in (key, value))
    scores = ops.swapaxes(ops.matmul(key, ops.swapaxes(query, -1, -2)), -1, -2)
    # In float32: 3B has head_dim 100, and bfloat16 would round 1/sqrt(100).
    scores = ops.cast(scores, "float32") * head_dim**-0.5
    if scales:
        scores = scores * scales[0][:, None]
    if 1 < bias.shape[1] < queries:  # The bias of a single query broadcasts.
        bias = ops.tile(bias, (1, queries // bias.shape[1], 1))
    weights = ops.softmax(scores + bias, axis=-1)
    if scales:
        weights = weights * scales[1][:, None]
    return ops.matmul(ops.cast(weights, query.dtype), value)


def attend_blockwise(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor,
    end: Tensor,
    scales: Scales = (),
) -> Tensor:
    """`attend_cached` for a chunk of a prompt, over the used columns of the cache only.

    It processes one block of columns at a time. The softmax keeps a running maximum of
    the scores and rescales the sums when the maximum grows.

    Args:
        query: See `attend_cached`.
        key: See `attend_cached`. `CACHE_BLOCK` must divide the number of columns.
        value: See `attend_cached`.
        bias: See `attend_cached`.
        end: Int scalar, the number of used columns.
        scales: See `attend_cached`.

    Returns:
        Tensor `(batch, num_query_heads, length, head_dim)` with the dtype of `query`.

    Source: the online softmax of FlashAttention (arXiv:2205.14135).
    """
    arguments = query, key, value, bias, end, scales
    if keras.config.backend() != "jax":
        return _attend_blocks(*arguments, block=CACHE_BLOCK)
    batch, heads, length, _ = query.shape
    block = block_columns(batch * heads * length, key.shape[1])
    return jax.lax.platform_dependent(
        *arguments,
        # On a CPU, the scores of a block fit in its cache.
        cpu=functools.partial(_attend_blocks, block=CACHE_BLOCK),
        default=functools.partial(_attend_blocks, block=block),
    )


def _attend_blocks(query, key, value, bias, end, scales, block):
    shape = query.shape
    length, head_dim = shape[2:]
    query = fold_query_groups(query, key)
    heads_and_batch, queries, _ = query.shape

    def add_block(i, largest, total, context):
        start = i * block
        keys, values = (
            ops.cast(
                ops.slice(x, (0, start, 0), (heads_and_batch, block, head_dim)),
                query.dtype,
            )
            for x in (key, value)
        )
        factors = [
            ops.slice(x, (0, start), (heads_and_batch, block))[:, None] for x in scales
        ]
        scores = matmul_float32(query, ops.swapaxes(keys, -1, -2)) * head_dim**-0.5
        if factors:
            scores = scores * factors[0]
        block_bias = ops.slice(bias, (0, 0, start), (heads_and_batch, length, block))
        scores = scores + ops.tile(block_bias, (1, queries // length, 1))
        new_largest = ops.maximum(largest, ops.max(scores, axis=-1, keepdims=True))
        weights = ops.exp(scores - new_largest)
        rescale = ops.exp(largest - new_largest)
        total = total * rescale + ops.sum(weights, axis=-1, keepdims=True)
        if factors:
            weights = weights * factors[1]
        added = matmul_float32(ops.cast(weights, values.dtype), values)
        return (
            i + 1,
            new_largest,
            total,
            context * rescale + added,
        )

    _, _, total, context = ops.while_loop(
        lambda i, *_: i * block < end,
        add_block,
        (
            ops.zeros((), "int32"),
            ops.full((heads_and_batch, queries, 1), float("-inf"), "float32"),
            ops.zeros((heads_and_batch, queries, 1), "float32"),
            ops.zeros((heads_and_batch, queries, head_dim), "float32"),
        ),
    )
    return unfold_query_groups(ops.cast(context / total, query.dtype), shape)


def block_columns(queries: int, columns: int) -> int:
    """Returns how many columns of the cache an accelerator processes at once.

    Args:
        queries: Number of queries, over all sequences and heads.
        columns: Number of columns of the cache, a multiple of `CACHE_BLOCK`.

    Returns:
        A divisor of `columns`.
    """
    for block in ACCELERATOR_BLOCKS:
        if columns % block == 0 and queries * block <= MAX_BLOCK_SCORES:
            return block
    return CACHE_BLOCK


def fold_query_groups(query: Tensor, key: Tensor) -> Tensor:
    """Folds the query heads that share a key/value head into the length axis.

    So grouped-query attention does not repeat keys and values.

    Args:
        query: Float tensor `(batch, num_query_heads, length, head_dim)`.
        key: Float tensor `(num_key_value_heads * batch, columns, head_dim)`.

    Returns:
        Tensor `(num_key_value_heads * batch, group * length, head_dim)`, its first axis
        in the order of `key`.
    """
    batch, _, _, head_dim = query.shape
    heads = key.shape[0] // batch
    return heads_first(ops.reshape(query, (batch, heads, -1, head_dim)))


def unfold_query_groups(x: Tensor, shape: Sequence[int]) -> Tensor:
    """Inverts `fold_query_groups`.

    Args:
        x: Tensor `(num_key_value_heads * batch, group * length, head_dim)`.
        shape: `(batch, num_query_heads, length, head_dim)`.

    Returns:
        Tensor of the shape `shape`.
    """
    batch, head_dim = shape[0], shape[3]
    x = ops.reshape(x, (x.shape[0] // batch, batch, x.shape[1], head_dim))
    return ops.reshape(ops.swapaxes(x, 0, 1), shape)


def matmul_float32(x: Tensor, y: Tensor) -> Tensor:
    """Returns `x @ y` as a float32 tensor, on JAX accumulated in float32.

    In bfloat16, XLA on CPUs is fast with float32 results only.
    """
    if keras.config.backend() == "jax":
        return jax.numpy.matmul(x, y, preferred_element_type="float32")
    return ops.cast(ops.matmul(x, y), "float32")


def heads_first(x: Tensor) -> Tensor:
    """Reshapes keys or values for a KV cache.

    Args:
        x: Tensor `(batch, heads, length, ...)`.

    Returns:
        Tensor `(heads * batch, length, ...)`. Heads come first, so that a cache can be
        sharded by heads.

    Example:
        >>> heads_first(ops.ones((2, 4, 3, 8))).shape
        (8, 3, 8)
    """
    batch, heads, *shape = x.shape
    return ops.reshape(ops.swapaxes(x, 0, 1), (heads * batch, *shape))


def update_cache(cache: Tensor, update: Tensor, column: Any) -> Tensor:
    """Returns a tensor of the cache with columns written.

    XLA reuses the donated buffer; PyTorch writes in place.

    Args:
        cache: Tensor `(heads * batch, columns, ...)`. On PyTorch the view of
            `kv_cache.used_columns`, which ends where `update` ends.
        update: Tensor `(heads * batch, length, ...)`.
        column: Int scalar, the column where `update` starts. Ignored on PyTorch.

    Returns:
        The updated cache.

    Example:
        >>> update_cache(ops.zeros((1, 4, 1)), ops.ones((1, 2, 1)), 1)[0, :, 0].tolist()
        [0.0, 1.0, 1.0, 0.0]
    """
    if keras.config.backend() == "torch":
        # `slice_update` copies the whole cache on PyTorch; XLA reuses its buffer.
        cache[:, -update.shape[1] :] = update
        return cache
    starts = (0, column, 0)[: len(cache.shape)]
    return ops.slice_update(cache, starts, update)
