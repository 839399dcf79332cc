"""Attention over a cache of keys and values, for decoding."""

import keras
from keras import ops

if keras.config.backend() == "torch":
    import torch
elif keras.config.backend() == "jax":
    import jax

# The score of a key that may not be looked at. A finite number: a row that may look
# nowhere (padding) must not become NaN.
HIDDEN = -1e30
BLOCK = 256  # Ours: columns of the cache that a chunk looks at together, on a CPU.
# The same on accelerators, where an iteration of a loop costs more than what it
# computes, and the most scores in float32 that a block may have there: 1 GiB.
LARGE_BLOCKS, LARGEST_SCORES = (1024, 512), 1 << 28


def attend_cached(query, key, value, bias):
    """Attention over a cache, whose layout lets each backend read it only once.

    Heads and rows share one axis, since XLA on a CPU otherwise copies the whole cache
    in each step; and the scores are key times query, since the product the other way
    round reads the keys at a tenth of the memory's speed (`benchmarks/README.md`).

    Args:
        query: `(batch, num_query_heads, length, head_dim)`.
        key, value: `(num_key_value_heads * batch, columns, head_dim)`.
        bias: float32 `(num_key_value_heads * batch, length, columns)`; 0 where a query
            may look at a key, and `HIDDEN` elsewhere.

    Returns:
        `(batch, num_query_heads, length, head_dim)` in the dtype of `value`.
    """
    shape = query.shape
    query = join_groups(query, key)
    group = query.shape[1] // shape[2]
    scores = ops.swapaxes(ops.matmul(key, ops.swapaxes(query, -1, -2)), -1, -2)
    # In float32, since bfloat16 has no 1/sqrt(100).
    scores = ops.cast(scores, "float32") * shape[3] ** -0.5
    if shape[2] > 1 and group > 1:
        bias = ops.tile(bias, (1, group, 1))
    weights = ops.cast(ops.softmax(scores + bias, axis=-1), value.dtype)
    return part_groups(ops.matmul(weights, value), shape)


def attend_by_blocks(query, key, value, bias, end):
    """The same for a chunk of a prompt: only over columns in use, a block at a time.

    Block by block, the softmax keeps the largest score so far and rescales what was
    summed under a smaller one.

    Args:
        query, key, value, bias: see `attend_cached`; `BLOCK` divides the columns.
        end: int scalar, the number of columns in use.

    Returns:
        As `attend_cached`.

    Source: the online softmax of FlashAttention (arXiv:2205.14135).
    """
    shape = query.shape
    length, head_dim = shape[2:]
    query = join_groups(query, key)
    heads, rows, _ = query.shape
    block = block_columns(heads * rows, key.shape[1])

    def add_block(i, largest, total, context):
        start = i * block
        keys, values = (
            ops.slice(x, (0, start, 0), (heads, block, head_dim)) for x in (key, value)
        )
        scores = matmul_float32(query, ops.swapaxes(keys, -1, -2)) * head_dim**-0.5
        hidden = ops.slice(bias, (0, 0, start), (heads, length, block))
        scores = scores + ops.tile(hidden, (1, rows // length, 1))
        new_largest = ops.maximum(largest, ops.max(scores, axis=-1, keepdims=True))
        weights = ops.exp(scores - new_largest)
        rescale = ops.exp(largest - new_largest)
        added = matmul_float32(ops.cast(weights, values.dtype), values)
        return (
            i + 1,
            new_largest,
            total * rescale + ops.sum(weights, axis=-1, keepdims=True),
            context * rescale + added,
        )

    _, _, total, context = ops.while_loop(
        lambda i, *_: i * block < end,
        add_block,
        (
            ops.zeros((), "int32"),
            ops.full((heads, rows, 1), float("-inf"), "float32"),
            ops.zeros((heads, rows, 1), "float32"),
            ops.zeros((heads, rows, head_dim), "float32"),
        ),
    )
    return part_groups(ops.cast(context / total, value.dtype), shape)


def block_columns(queries, columns):
    """Columns that a chunk looks at together.

    Args:
        queries: int, of all rows and heads.
        columns: int, of the cache; a multiple of `BLOCK`.
    """
    if keras.config.backend() != "jax" or jax.default_backend() == "cpu":
        return BLOCK  # Its scores stay in a CPU's cache.
    for block in LARGE_BLOCKS:
        if columns % block == 0 and queries * block <= LARGEST_SCORES:
            return block
    return BLOCK


def join_groups(query, key):
    """Queries in the order of a cache's heads; those that share a head join the length.

    Args:
        query: `(batch, num_query_heads, length, head_dim)`.
        key: `(num_key_value_heads * batch, columns, head_dim)`.

    Returns:
        `(num_key_value_heads * batch, group * length, head_dim)`.
    """
    batch, _, _, head_dim = query.shape
    heads = key.shape[0] // batch
    return heads_first(ops.reshape(query, (batch, heads, -1, head_dim)))


def part_groups(x, shape):
    """Undoes `join_groups`; `shape` is that of its `query`."""
    batch, head_dim = shape[0], shape[3]
    x = ops.reshape(x, (x.shape[0] // batch, batch, x.shape[1], head_dim))
    return ops.reshape(ops.swapaxes(x, 0, 1), shape)


def matmul_float32(x, y):
    """`x @ y` with the sums in float32, which XLA on a CPU needs to be fast."""
    if keras.config.backend() == "jax":
        return jax.numpy.matmul(x, y, preferred_element_type="float32")
    return ops.cast(ops.matmul(x, y), "float32")


def attend_causally(query, key, value):
    """Attention where each position sees itself and all before it, on PyTorch.

    Args:
        query: `(batch, num_query_heads, length, head_dim)`.
        key, value: `(batch, num_key_value_heads, length, head_dim)`.

    Returns:
        `(batch, num_query_heads, length, head_dim)`.
    """
    return torch.nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, enable_gqa=query.shape[1] != key.shape[1]
    )


def heads_first(x):
    """`(batch, heads, length, head_dim)` as `(heads * batch, length, head_dim)`.

    Heads come first so that a cache can be sharded by heads.
    """
    batch, heads, length, head_dim = x.shape
    return ops.reshape(ops.swapaxes(x, 0, 1), (heads * batch, length, head_dim))


def write(cache, update, column):
    """Puts keys or values into the cache, in place.

    Args:
        cache: `(heads * batch, columns, head_dim)`. On PyTorch a view of the cache
            that ends where `update` ends.
        update: `(heads * batch, length, head_dim)`.
        column: int scalar, where `update` begins. Not used on PyTorch.

    Returns:
        The updated cache.
    """
    if keras.config.backend() == "torch":
        # `slice_update` copies the whole cache there; XLA updates in place.
        cache[:, -update.shape[1] :] = update
        return cache
    return ops.slice_update(cache, (0, column, 0), update)
