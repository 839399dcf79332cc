"""Attention over a cache is attention over the whole sequence."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_openllama.layers import (
    CausalSelfAttention,
    RotaryEmbedding,
    cached_attention,
)
from keras_openllama.layers.attention import causal_mask
from keras_openllama.layers.cached_attention import (
    BLOCK,
    HIDDEN,
    attend_by_blocks,
    attend_cached,
    heads_first,
    join_groups,
    part_groups,
    write,
)


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def in_use(cache, end):
    """On PyTorch a layer gets the columns that are in use; with XLA the whole cache."""
    if keras.config.backend() == "torch":
        return tuple(x[:, :end] for x in cache)
    return cache


def test_write_puts_columns_in_their_place():
    cache = ops.zeros((2, 6, 4))
    (seen,) = in_use([cache], 5)
    updated = ops.convert_to_numpy(write(seen, ops.ones((2, 2, 4)), np.int32(3)))
    np.testing.assert_array_equal(updated[1, :5, 0], [0, 0, 0, 1, 1])
    assert not updated[:, 5:].any()


def test_groups_are_joined_by_the_head_that_they_share_and_parted_again():
    query = random(2, 6, 5, 4)
    key = heads_first(ops.convert_to_tensor(random(2, 3, 7, 4)))
    joined = join_groups(ops.convert_to_tensor(query), key)
    assert tuple(joined.shape) == (3 * 2, 2 * 5, 4)
    # Queries 2 and 3 share head 1, whose place for row 1 is 1 * 2 + 1.
    expected = query[1, 2:4].reshape(10, 4)
    np.testing.assert_array_equal(ops.convert_to_numpy(joined)[3], expected)
    parted = part_groups(joined, query.shape)
    np.testing.assert_array_equal(ops.convert_to_numpy(parted), query)


@pytest.mark.parametrize(("heads", "head_dim"), [((4, 2), 16), ((3, 3), 100)])
def test_a_cache_changes_nothing(heads, head_dim):
    layer = CausalSelfAttention(*heads, head_dim)
    x = ops.convert_to_tensor(random(2, 6, 32))
    positions = ops.arange(6)[None]
    cos, sin = RotaryEmbedding(head_dim)(positions)
    whole = layer(x, cos, sin, causal_mask(positions))
    cache = tuple(ops.zeros((heads[1] * 2, 6, head_dim)) for _ in "kv")
    for start, end in ((0, 3), (3, 4), (4, 6)):  # A chunk, a step, a chunk.
        now = slice(start, end)
        seen = in_use(cache, end)
        visible = np.arange(seen[0].shape[1])[None] <= np.arange(start, end)[:, None]
        bias = np.where(visible, 0, HIDDEN)[None].repeat(heads[1] * 2, axis=0)
        y, seen = layer(
            x[:, now],
            cos[:, :, now],
            sin[:, :, now],
            ops.convert_to_tensor(bias.astype("float32")),
            cache=seen,
            column=np.int32(start),
        )
        cache = cache if keras.config.backend() == "torch" else seen
        np.testing.assert_allclose(
            ops.convert_to_numpy(y), ops.convert_to_numpy(whole[:, now]), atol=1e-5
        )


@pytest.mark.parametrize(("heads", "head_dim"), [((4, 2), 16), ((3, 3), 100)])
@pytest.mark.parametrize("start", [0, BLOCK - 2, 2 * BLOCK - 5, 3 * BLOCK])
@pytest.mark.parametrize("block", [BLOCK, 2 * BLOCK])
def test_blocks_give_what_the_whole_cache_gives(
    heads, head_dim, start, block, monkeypatch
):
    monkeypatch.setattr(cached_attention, "block_columns", lambda *_: block)
    batch, length, columns = 2, 5, 4 * BLOCK
    query = random(batch, heads[0], length, head_dim)
    key, value = (random(batch * heads[1], columns, head_dim, seed=s) for s in (1, 2))
    fed = start + np.arange(length)
    bias = np.where(np.arange(columns)[None] <= fed[:, None], 0, HIDDEN)
    bias = bias[None].repeat(batch * heads[1], axis=0)
    bias[0, :, : start // 2] = HIDDEN  # A gap in one row.
    arrays = [ops.convert_to_tensor(a.astype("float32")) for a in (query, key, value)]
    bias = ops.convert_to_tensor(bias.astype("float32"))
    whole = attend_cached(*arrays, bias)
    # What lies beyond is not looked at, be it as it may.
    arrays[2] = ops.where(
        ops.arange(columns)[None, :, None] < start + 5, arrays[2], 9.0
    )
    blocks = attend_by_blocks(*arrays, bias, start + length)
    np.testing.assert_allclose(
        ops.convert_to_numpy(blocks), ops.convert_to_numpy(whole), atol=1e-5
    )


@pytest.mark.skipif(keras.config.backend() != "jax", reason="is about JAX's devices")
def test_an_accelerator_looks_at_larger_blocks_within_its_memory(monkeypatch):
    monkeypatch.setattr("jax.default_backend", lambda: "gpu")
    assert cached_attention.block_columns(32 * 1024, 2048) == 1024
    assert cached_attention.block_columns(64 * 32 * 256, 2048) == 512
    assert cached_attention.block_columns(64 * 32 * 1024, 2048) == BLOCK
    assert cached_attention.block_columns(32, 3 * BLOCK) == BLOCK
    monkeypatch.setattr("jax.default_backend", lambda: "cpu")
    assert cached_attention.block_columns(32 * 1024, 2048) == BLOCK
