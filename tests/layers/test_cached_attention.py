"""Attention over a KV cache equals attention over the whole sequence."""

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
    CACHE_BLOCK,
    MASKED_SCORE,
    attend_blockwise,
    attend_cached,
    fold_query_groups,
    heads_first,
    unfold_query_groups,
    update_cache,
)


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def in_use(cache, end):
    """PyTorch passes the used columns to a layer, XLA the whole cache."""
    if keras.config.backend() == "torch":
        return tuple(x[:, :end] for x in cache)
    return cache


def test_update_cache_writes_the_given_columns():
    cache = ops.zeros((2, 6, 4))
    (used,) = in_use([cache], 5)
    updated = ops.convert_to_numpy(update_cache(used, ops.ones((2, 2, 4)), np.int32(3)))
    np.testing.assert_array_equal(updated[1, :5, 0], [0, 0, 0, 1, 1])
    assert not updated[:, 5:].any()


def test_unfold_query_groups_inverts_fold_query_groups():
    query = random(2, 6, 5, 4)
    key = heads_first(ops.convert_to_tensor(random(2, 3, 7, 4)))
    joined = fold_query_groups(ops.convert_to_tensor(query), key)
    assert tuple(joined.shape) == (3 * 2, 2 * 5, 4)
    # Queries 2 and 3 share head 1. In sequence 1 its index is 1 * 2 + 1.
    expected = query[1, 2:4].reshape(10, 4)
    np.testing.assert_array_equal(ops.convert_to_numpy(joined)[3], expected)
    split = unfold_query_groups(joined, query.shape)
    np.testing.assert_array_equal(ops.convert_to_numpy(split), query)


@pytest.mark.parametrize(("heads", "head_dim"), [((4, 2), 16), ((3, 3), 100)])
def test_causal_self_attention_with_a_cache_equals_without(heads, head_dim):
    layer = CausalSelfAttention(*heads, head_dim)
    x = ops.convert_to_tensor(random(2, 6, 32))
    positions = ops.arange(6)[None]
    cos, sin = RotaryEmbedding(head_dim)(positions)
    expected = layer(x, cos, sin, causal_mask(positions))
    cache = tuple(ops.zeros((heads[1] * 2, 6, head_dim)) for _ in "kv")
    for start, end in ((0, 3), (3, 4), (4, 6)):  # A chunk, a single token, a chunk.
        now = slice(start, end)
        seen = in_use(cache, end)
        visible = np.arange(seen[0].shape[1])[None] <= np.arange(start, end)[:, None]
        bias = np.where(visible, 0, MASKED_SCORE)[None].repeat(heads[1] * 2, axis=0)
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
            ops.convert_to_numpy(y), ops.convert_to_numpy(expected[:, now]), atol=1e-5
        )


@pytest.mark.parametrize(("heads", "head_dim"), [((4, 2), 16), ((3, 3), 100)])
@pytest.mark.parametrize(
    "start", [0, CACHE_BLOCK - 2, 2 * CACHE_BLOCK - 5, 3 * CACHE_BLOCK]
)
@pytest.mark.parametrize("block", [CACHE_BLOCK, 2 * CACHE_BLOCK])
def test_attend_blockwise_equals_attend_cached(
    heads, head_dim, start, block, monkeypatch
):
    monkeypatch.setattr(cached_attention, "CACHE_BLOCK", block)
    batch, length, columns = 2, 5, 4 * CACHE_BLOCK
    query = random(batch, heads[0], length, head_dim)
    key, value = (random(batch * heads[1], columns, head_dim, seed=s) for s in (1, 2))
    fed = start + np.arange(length)
    bias = np.where(np.arange(columns)[None] <= fed[:, None], 0, MASKED_SCORE)
    bias = bias[None].repeat(batch * heads[1], axis=0)
    bias[0, :, : start // 2] = MASKED_SCORE  # A gap in one sequence.
    arrays = [ops.convert_to_tensor(a.astype("float32")) for a in (query, key, value)]
    bias = ops.convert_to_tensor(bias.astype("float32"))
    expected = attend_cached(*arrays, bias)
    # Unused columns must not be read.
    arrays[2] = ops.where(
        ops.arange(columns)[None, :, None] < start + 5, arrays[2], 9.0
    )
    blocks = attend_blockwise(*arrays, bias, start + length)
    np.testing.assert_allclose(
        ops.convert_to_numpy(blocks), ops.convert_to_numpy(expected), atol=1e-5
    )


def test_block_columns_are_larger_on_accelerators_within_memory():
    assert cached_attention.block_columns(32 * 1024, 2048) == 1024
    assert cached_attention.block_columns(64 * 32 * 256, 2048) == 512
    assert cached_attention.block_columns(64 * 32 * 1024, 2048) == CACHE_BLOCK
    assert cached_attention.block_columns(32, 3 * CACHE_BLOCK) == CACHE_BLOCK


@pytest.mark.skipif(keras.config.backend() != "jax", reason="Tests JAX's devices.")
def test_attend_blockwise_selects_blocks_by_the_device_of_the_program():
    import jax

    shapes = (1, 2, 4, 8), (2, 2048, 8), (2, 2048, 8), (2, 4, 2048)
    tensors = [jax.ShapeDtypeStruct(shape, "float32") for shape in shapes]
    end = jax.ShapeDtypeStruct((), "int32")
    program = jax.jit(attend_blockwise).trace(*tensors, end)
    for platform, block in {"cpu": CACHE_BLOCK, "cuda": 1024, "tpu": 1024}.items():
        text = program.lower(lowering_platforms=(platform,)).as_text()
        found = {
            size for size in (CACHE_BLOCK, 512, 1024) if f"tensor<2x{size}x" in text
        }
        assert found == {block}
