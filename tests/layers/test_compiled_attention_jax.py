"""`compiled_causal_attention` equals `dot_product_attention`, with its gradients."""

import types

import keras
import pytest

if keras.config.backend() != "jax":
    pytest.skip("Needs JAX.", allow_module_level=True)

import jax
import jax.numpy as jnp
import numpy as np

from keras_openllama.layers import compiled_attention_jax
from keras_openllama.layers.attention import (
    causal_attention,
    causal_mask,
    dot_product_attention,
)
from keras_openllama.layers.attention_kernels import select_attention
from keras_openllama.layers.compiled_attention_jax import (
    compiled_causal_attention,
    is_compiled,
)
from keras_openllama.native.library import native_library

pytestmark = pytest.mark.skipif(
    native_library() is None or jax.device_count() > 1,
    reason="the library is not compiled on this system, or for several devices",
)
NAME = "keras_openllama_causal_attention"


def inputs(query_heads, heads, head_dim, dtype="float32", length=70):
    """Queries, keys, values, a mask with documents and padding, and a gradient."""
    keys = jax.random.split(jax.random.key(0), 4)
    sizes = (query_heads, heads, heads, query_heads)
    query, key, value, gradient = (
        jax.random.normal(k, (2, size, length, head_dim), dtype)
        for k, size in zip(keys, sizes, strict=True)
    )
    index = 1 + np.arange(length)[None] * 2 // length * np.array([[0], [1]])
    index[:, length - 3 :] = 0
    mask = causal_mask(jnp.arange(length)[None], jnp.asarray(index))
    return (query, key, value), mask, gradient


def with_gradients(attend, tensors, gradient):
    output, pull_back = jax.vjp(attend, *tensors)
    return output, *pull_back(gradient)


def assert_equals_dot_product_attention(attend, tensors, mask, gradient):
    found = jax.jit(lambda *x: with_gradients(lambda *y: attend(*y, mask), *x))(
        tensors, gradient
    )
    expected = with_gradients(
        lambda *x: dot_product_attention(*x, mask), tensors, gradient
    )
    for array, exact in zip(found, expected, strict=True):
        np.testing.assert_allclose(array, exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("query_heads", "heads"), [(4, 4), (4, 2)])
@pytest.mark.parametrize("head_dim", [8, 100])
@pytest.mark.parametrize("length", [5, 70])
def test_compiled_attention_equals_dot_product_attention(
    query_heads, heads, head_dim, length
):
    assert is_compiled()
    assert_equals_dot_product_attention(
        compiled_causal_attention, *inputs(query_heads, heads, head_dim, length=length)
    )


def test_compiled_attention_takes_a_mask_for_all_sequences():
    tensors, _, gradient = inputs(2, 1, 8)
    mask = causal_mask(jnp.arange(70)[None])
    assert_equals_dot_product_attention(
        compiled_causal_attention, tensors, mask, gradient
    )


def test_compiled_attention_computes_bfloat16_in_float32():
    tensors, mask, gradient = inputs(4, 2, 8, "bfloat16")
    exact = with_gradients(
        lambda *x: dot_product_attention(*x, mask),
        [x.astype("float32") for x in tensors],
        gradient.astype("float32"),
    )
    found = with_gradients(
        lambda *x: compiled_causal_attention(*x, mask), tensors, gradient
    )
    for array, expected in zip(found, exact, strict=True):
        assert array.dtype == "bfloat16"
        scale = np.abs(expected).max()
        np.testing.assert_allclose(
            array.astype("float32"), expected, rtol=0, atol=2**-8 * scale
        )


def test_compiled_attention_is_recomputed_in_a_scan_of_checkpoints():
    (query, key, value), mask, gradient = inputs(2, 2, 8)
    scales = jnp.array([1.0, 0.5, 2.0])

    def layers(attend, query, scales):
        @jax.checkpoint
        def layer(x, scale):
            return x + attend(scale * x, key, value, mask), None

        return jax.lax.scan(layer, query, scales)[0]

    found, expected = (
        with_gradients(
            lambda *x, attend=attend: layers(attend, *x), (query, scales), gradient
        )
        for attend in (compiled_causal_attention, dot_product_attention)
    )
    for array, exact in zip(found, expected, strict=True):
        np.testing.assert_allclose(array, exact, rtol=1e-4, atol=1e-4)


CPU = types.SimpleNamespace(platform="cpu")


def program(attend):
    (query, key, value), mask, _ = inputs(2, 1, 8)
    return str(jax.make_jaxpr(attend)(query, key, value, mask, mask[:, 0, 0]))


def test_select_attention_is_compiled_on_a_single_cpu_only(monkeypatch):
    assert NAME in program(select_attention(CPU))
    gpu = types.SimpleNamespace(
        platform="gpu", client=types.SimpleNamespace(platform_version="rocm")
    )
    assert NAME not in program(select_attention(gpu))
    assert NAME not in program(select_attention(CPU, mesh="a mesh"))
    monkeypatch.setattr(jax, "device_count", lambda: 2)
    assert NAME not in program(select_attention(CPU))


def test_select_attention_without_a_compiler_is_by_xla(monkeypatch):
    monkeypatch.setattr(compiled_attention_jax, "_register", lambda: False)
    assert NAME not in program(select_attention(CPU))


def test_causal_attention_has_no_function_that_jax_cannot_export():
    attend = jax.jit(lambda q, k, v, mask, _: causal_attention(q, k, v, mask))
    assert NAME not in program(attend)
