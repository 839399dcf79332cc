"""Attention: masks, grouped heads and dtypes."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_openllama.layers import CausalSelfAttention
from keras_openllama.layers.attention import (
    causal_mask,
    dot_product_attention,
)


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def test_dot_product_attention_is_softmax_of_scaled_products():
    q, k, v = (random(2, 3, 5, 100, seed=s) for s in range(3))
    mask = causal_mask(np.arange(5)[None])
    scores = q @ k.swapaxes(-1, -2) / np.sqrt(100)
    scores = np.where(ops.convert_to_numpy(mask), scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    out = dot_product_attention(*map(ops.convert_to_tensor, (q, k, v)), mask)
    np.testing.assert_allclose(ops.convert_to_numpy(out), weights @ v, atol=1e-5)


def test_dot_product_attention_of_grouped_heads_equals_repeated_heads():
    q, k, v = random(2, 6, 5, 16), random(2, 2, 5, 16), random(2, 2, 5, 16, seed=1)
    q, k, v = map(ops.convert_to_tensor, (q, k, v))
    mask = causal_mask(np.arange(5)[None])
    grouped = dot_product_attention(q, k, v, mask)
    repeated = dot_product_attention(
        q, ops.repeat(k, 3, axis=1), ops.repeat(v, 3, axis=1), mask
    )
    np.testing.assert_allclose(
        ops.convert_to_numpy(grouped), ops.convert_to_numpy(repeated), atol=1e-6
    )


def test_dot_product_attention_without_visible_keys_is_finite():
    q = ops.convert_to_tensor(random(1, 1, 2, 8))
    out = dot_product_attention(q, q, q, ops.zeros((1, 1, 2, 2), "bool"))
    assert np.isfinite(ops.convert_to_numpy(out)).all()


def test_causal_mask_is_causal_and_hides_padding():
    mask = causal_mask(np.arange(3)[None], np.array([[1, 1, 1], [1, 0, 1]]))
    expected = [[[1, 0, 0], [1, 1, 0], [1, 1, 1]], [[1, 0, 0], [1, 0, 0], [1, 0, 1]]]
    np.testing.assert_array_equal(ops.convert_to_numpy(mask)[:, 0], expected)


def test_dot_product_attention_scales_in_float32_under_bfloat16():
    q, k = (ops.cast(random(1, 1, 5, 100, seed=s), "bfloat16") for s in (0, 1))
    v = ops.convert_to_tensor(random(1, 1, 5, 100, seed=2))
    products = ops.cast(ops.matmul(q, ops.swapaxes(k, -1, -2)), "float32")
    scores = ops.convert_to_numpy(products) / np.sqrt(100)
    weights = np.exp(scores) / np.exp(scores).sum(axis=-1, keepdims=True)
    # Values in float32, so that only scores and weights could be rounded.
    out = ops.convert_to_numpy(
        dot_product_attention(q, k, v, ops.ones((1, 1, 5, 5), "bool"))
    )
    np.testing.assert_allclose(out, weights @ ops.convert_to_numpy(v), atol=1e-5)
    out = dot_product_attention(
        q, k, ops.cast(v, "bfloat16"), ops.ones((1, 1, 5, 5), "bool")
    )
    assert keras.backend.standardize_dtype(out.dtype) == "bfloat16"


def test_causal_self_attention_rejects_heads_that_do_not_group():
    with pytest.raises(ValueError, match="num_key_value_heads=3"):
        CausalSelfAttention(4, 3, 16)
