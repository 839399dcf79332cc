"""`attend_by_head` equals `dot_product_attention`, with its gradients."""

import keras
import pytest

if keras.config.backend() != "jax":
    pytest.skip("Needs JAX.", allow_module_level=True)

import jax
import jax.numpy as jnp
import numpy as np

from keras_openllama.layers.attention import (
    causal_attention,
    causal_mask,
    dot_product_attention,
)
from keras_openllama.layers.attention_by_head import attend_by_head

LENGTH = 13


def inputs(query_heads, heads, head_dim, dtype="float32", length=LENGTH):
    """Queries, keys, values, a mask with padding, and a gradient."""
    batch = 2
    keys = jax.random.split(jax.random.key(0), 4)
    sizes = (query_heads, heads, heads, query_heads)
    query, key, value, gradient = (
        jax.random.normal(k, (batch, size, length, head_dim), dtype)
        for k, size in zip(keys, sizes, strict=True)
    )
    padding = jnp.arange(length)[None] < jnp.array([[length], [length - 3]])
    positions = jnp.broadcast_to(jnp.arange(length), (batch, length))
    mask = causal_mask(positions, padding.astype("int32"))
    return (query, key, value), mask, gradient


def with_gradients(attend, tensors, gradient):
    output, pull_back = jax.vjp(attend, *tensors)
    return output, *pull_back(gradient)


@pytest.mark.parametrize(("query_heads", "heads"), [(4, 4), (4, 2)])
@pytest.mark.parametrize("head_dim", [8, 100])
@pytest.mark.parametrize("block", [4, 16])
def test_attend_by_head_equals_dot_product_attention(
    query_heads, heads, head_dim, block
):
    tensors, mask, gradient = inputs(query_heads, heads, head_dim)
    found = with_gradients(
        lambda *x: attend_by_head(*x, mask, block), tensors, gradient
    )
    expected = with_gradients(
        lambda *x: dot_product_attention(*x, mask), tensors, gradient
    )
    for array, exact in zip(found, expected, strict=True):
        np.testing.assert_allclose(array, exact, rtol=1e-5, atol=1e-5)


def test_attend_by_head_takes_a_mask_for_all_sequences():
    tensors, _, _ = inputs(2, 1, 8)
    mask = causal_mask(jnp.arange(LENGTH)[None])
    np.testing.assert_allclose(
        attend_by_head(*tensors, mask, block=5),
        dot_product_attention(*tensors, mask),
        rtol=1e-5,
        atol=1e-5,
    )


def test_attend_by_head_computes_bfloat16_in_float32():
    tensors, mask, _ = inputs(4, 2, 8, "bfloat16")
    exact = dot_product_attention(*(x.astype("float32") for x in tensors), mask)
    found = attend_by_head(*tensors, mask, block=4)
    assert found.dtype == "bfloat16"
    np.testing.assert_allclose(found.astype("float32"), exact, rtol=2**-7, atol=1e-6)


def test_causal_attention_of_several_blocks_runs_head_by_head_on_cpus(monkeypatch):
    tensors, mask, _ = inputs(2, 1, 8, length=150)
    np.testing.assert_allclose(
        causal_attention(*tensors, mask),
        dot_product_attention(*tensors, mask),
        rtol=1e-5,
        atol=1e-5,
    )
    program = str(jax.make_jaxpr(causal_attention)(*tensors, mask))
    assert "scan" in program
