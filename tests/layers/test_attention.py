"""Attention: who sees whom, grouped heads, and the cache."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_openllama.layers import CausalSelfAttention, RotaryEmbedding
from keras_openllama.layers.attention import attend, causal_mask
from keras_openllama.layers.cached_attention import (
    BLOCK,
    HIDDEN,
    attend_by_blocks,
    attend_cached,
    write,
)


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def test_attention_is_softmax_of_scaled_products():
    q, k, v = (random(2, 3, 5, 100, seed=s) for s in range(3))
    mask = causal_mask(np.arange(5)[None])
    scores = q @ k.swapaxes(-1, -2) / np.sqrt(100)
    scores = np.where(ops.convert_to_numpy(mask), scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    out = attend(*map(ops.convert_to_tensor, (q, k, v)), mask)
    np.testing.assert_allclose(ops.convert_to_numpy(out), weights @ v, atol=1e-5)


def test_grouped_heads_equal_repeated_heads():
    q, k, v = random(2, 6, 5, 16), random(2, 2, 5, 16), random(2, 2, 5, 16, seed=1)
    q, k, v = map(ops.convert_to_tensor, (q, k, v))
    mask = causal_mask(np.arange(5)[None])
    grouped = attend(q, k, v, mask)
    repeated = attend(q, ops.repeat(k, 3, axis=1), ops.repeat(v, 3, axis=1), mask)
    np.testing.assert_allclose(
        ops.convert_to_numpy(grouped), ops.convert_to_numpy(repeated), atol=1e-6
    )


def test_a_row_that_sees_nothing_stays_finite():
    q = ops.convert_to_tensor(random(1, 1, 2, 8))
    out = attend(q, q, q, ops.zeros((1, 1, 2, 2), "bool"))
    assert np.isfinite(ops.convert_to_numpy(out)).all()


def test_mask_is_causal_and_hides_padding():
    mask = causal_mask(np.arange(3)[None], np.array([[1, 1, 1], [1, 0, 1]]))
    expected = [[[1, 0, 0], [1, 1, 0], [1, 1, 1]], [[1, 0, 0], [1, 0, 0], [1, 0, 1]]]
    np.testing.assert_array_equal(ops.convert_to_numpy(mask)[:, 0], expected)


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
@pytest.mark.parametrize("start", [0, BLOCK - 2, 2 * BLOCK - 5])
def test_blocks_give_what_the_whole_cache_gives(heads, head_dim, start):
    batch, length, columns = 2, 5, 3 * BLOCK
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


def test_scale_and_softmax_are_float32_under_bfloat16():
    q, k = (ops.cast(random(1, 1, 5, 100, seed=s), "bfloat16") for s in (0, 1))
    v = ops.convert_to_tensor(random(1, 1, 5, 100, seed=2))
    products = ops.cast(ops.matmul(q, ops.swapaxes(k, -1, -2)), "float32")
    scores = ops.convert_to_numpy(products) / np.sqrt(100)
    weights = np.exp(scores) / np.exp(scores).sum(axis=-1, keepdims=True)
    # Values in float32, so that nothing else rounds.
    out = ops.convert_to_numpy(attend(q, k, v, ops.ones((1, 1, 5, 5), "bool")))
    np.testing.assert_allclose(out, weights @ ops.convert_to_numpy(v), atol=1e-5)
    out = attend(q, k, ops.cast(v, "bfloat16"), ops.ones((1, 1, 5, 5), "bool"))
    assert keras.backend.standardize_dtype(out.dtype) == "bfloat16"


def test_heads_that_do_not_group_are_refused():
    with pytest.raises(ValueError, match="num_key_value_heads=3"):
        CausalSelfAttention(4, 3, 16)
