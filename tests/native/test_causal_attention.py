"""The compiled causal attention equals attention in float64, with its gradients."""

import native_products
import numpy as np
import pytest

from keras_openllama.native.causal_attention import CausalAttention, Heads
from keras_openllama.native.library import compile_library, native_library

pytestmark = [pytest.mark.backend_free, native_products.needs_them]

GRADIENTS = "query_gradient", "key_gradient", "value_gradient"


def random(*shape, seed):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def inputs(batch, query_heads, heads, length, head_dim):
    """Queries, keys, values and a gradient; values as projections give them."""
    query, gradient = (
        random(batch, query_heads, length, head_dim, seed=s) for s in (0, 3)
    )
    key = random(batch, heads, length, head_dim, seed=1)
    value = random(batch, length, heads, head_dim, seed=2).swapaxes(1, 2)
    return 2 * query, key, value, gradient


def causal_mask(length):
    return np.tril(np.ones((1, length, length), bool))


def mask_of_documents(batch, length):
    """Documents that end in different blocks, and padding, at the start for one."""
    index = np.arange(length) * 3 // length + np.arange(batch)[:, None] % 2
    keys = index[:, None, :]
    return causal_mask(length) & (keys == index[:, :, None]) & (keys > 0)


def in_memory(x):
    assert x.strides[3] == x.itemsize
    return Heads(x.ctypes.data, [stride // x.itemsize for stride in x.strides[:3]])


def attend(tensors, mask, library, threads=1):
    """The output and the three gradients; what is not written is NaN."""
    query, key, value, gradient = tensors
    mask = np.ascontiguousarray(mask)
    results = [np.full(x.shape, np.nan, "float32") for x in (query, query, key, value)]
    log_sums = np.empty(query.shape[:3], "float32")
    batch, heads, length, head_dim = key.shape
    attention = CausalAttention(
        library.path,
        (batch, heads, query.shape[1] // heads, length, head_dim),
        threads,
        mask.ctypes.data,
        len(mask) == 1,
        log_sums.ctypes.data,
        query=in_memory(query),
        key=in_memory(key),
        value=in_memory(value),
        output=in_memory(results[0]),
    )
    attention.forward()
    names = "output_gradient", *GRADIENTS
    arrays = gradient, *results[1:]
    attention.backward(**dict(zip(names, map(in_memory, arrays), strict=True)))
    return results


def exact_attention(tensors, mask):
    """The same in float64; queries without a visible key are 0."""
    query, key, value, gradient = (x.astype("float64") for x in tensors)
    group, scale = query.shape[1] // key.shape[1], query.shape[-1] ** -0.5
    key, value = (np.repeat(x, group, axis=1) for x in (key, value))
    mask = mask[:, None]
    scores = np.where(mask, scale * query @ key.swapaxes(2, 3), -np.inf)
    weights = np.exp(scores - np.maximum(scores.max(-1, keepdims=True), -1e30))
    weights /= np.maximum(weights.sum(-1, keepdims=True), 1e-30)
    output = weights @ value
    products = np.sum(output * gradient, -1, keepdims=True)
    of_scores = scale * weights * (gradient @ value.swapaxes(2, 3) - products)
    of_key, of_value = (
        np.add.reduceat(x.swapaxes(2, 3) @ y, range(0, query.shape[1], group), axis=1)
        for x, y in ((of_scores, query), (weights, gradient))
    )
    return output, of_scores @ key, of_key, of_value


def assert_equals_exact(found, exact):
    for array, expected in zip(found, exact, strict=True):
        # Gradients of a query with one visible key are differences that cancel out.
        np.testing.assert_allclose(
            array, expected, rtol=0, atol=2e-6 * np.abs(expected).max() + 5e-6
        )


@pytest.mark.parametrize("options", native_products.OPTIONS, ids=["native", "avx2"])
@pytest.mark.parametrize("length", [1, 5, 64, 67, 129, 200])
@pytest.mark.parametrize(
    ("query_heads", "heads", "head_dim"), [(2, 2, 64), (3, 1, 100), (4, 2, 8)]
)
def test_compiled_attention_equals_attention_in_float64(
    options, length, query_heads, heads, head_dim
):
    library = compile_library(options)
    tensors = inputs(2, query_heads, heads, length, head_dim)
    for mask in (causal_mask(length), mask_of_documents(2, length)):
        found = attend(tensors, mask, library)
        assert_equals_exact(found, exact_attention(tensors, mask))


def test_results_of_compiled_attention_do_not_depend_on_threads():
    tensors, mask = inputs(3, 4, 2, 150, 64), causal_mask(150)
    first, *others = (
        attend(tensors, mask, native_library(), threads) for threads in (1, 2, 3, 99)
    )
    for other in others:
        for array, expected in zip(other, first, strict=True):
            np.testing.assert_array_equal(array, expected)


@pytest.mark.parametrize("options", native_products.OPTIONS, ids=["native", "avx2"])
def test_compiled_attention_takes_scores_of_any_size(options):
    query, key, value, gradient = inputs(1, 1, 1, 70, 8)
    tensors = 1e3 * query, key, value, gradient
    mask = causal_mask(70)
    found = attend(tensors, mask, compile_library(options))
    assert all(np.isfinite(array).all() for array in found)
    expected = exact_attention(tensors, mask)[0]
    np.testing.assert_allclose(found[0], expected, atol=1e-3)


@pytest.mark.parametrize("options", native_products.OPTIONS, ids=["native", "avx2"])
@pytest.mark.parametrize("tensor", [0, 1, 2])
def test_compiled_attention_of_not_a_number_is_not_a_number(options, tensor):
    tensors = inputs(1, 1, 1, 70, 8)
    tensors[tensor][0, 0, 66, 3] = np.nan
    output, *gradients = attend(tensors, causal_mask(70), compile_library(options))
    assert np.isfinite(output[:, :, :64]).all() or not tensor
    assert np.isnan(output[:, :, 66]).any()
    assert all(np.isnan(array).any() for array in gradients[:2])
