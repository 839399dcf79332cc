"""Fused kernels of accelerators compute the same attention (JAX)."""

import re
import types

import keras
import numpy as np
import pytest

from keras_openllama.layers.attention import causal_attention, causal_mask

if keras.config.backend() != "jax":
    pytest.skip("Kernels are JAX's.", allow_module_level=True)

import jax
import jax.numpy as jnp

from keras_openllama.layers import attention_kernels
from keras_openllama.layers.attention_kernels import (
    cudnn_attention,
    cudnn_prefill_attention,
    is_causality_sufficient,
    select_attention,
    select_prefill_attention,
    splash_attention,
)

# Query heads, key/value heads, head_dim, length. The blocks of the kernel are 128.
SHAPES = {
    "head_dim 100, two blocks": (2, 2, 100, 256),
    "grouped heads, a padded length": (4, 2, 64, 200),
}


def device(platform, version="", compute_capability=""):
    """What `select_attention` reads of a device."""
    return types.SimpleNamespace(
        platform=platform,
        client=types.SimpleNamespace(platform_version=version),
        compute_capability=compute_capability,
    )


CPU, TPU = device("cpu"), device("tpu")
GPU = device("gpu", "PJRT C API cuda 12080", "9.0")
OLD_GPU = device("gpu", "PJRT C API cuda 12080", "7.5")
ROCM = device("gpu", "rocm 60300", "gfx942")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(attention_kernels, "SPLASH_BLOCK", 128)


def heads(shape, dtype="float32"):
    """Query, key, value and a gradient of the context; two sequences of documents."""
    query_heads, key_value_heads, head_dim, length = shape
    random = np.random.default_rng(0)
    tensors = [
        jnp.asarray(random.normal(size=(2, count, length, head_dim)), dtype)
        for count in (query_heads, key_value_heads, key_value_heads, query_heads)
    ]
    documents = np.ones((2, length), "int32")
    documents[0, length // 3 :] = 2
    documents[1, -9:] = 0  # Padding.
    return tensors, jnp.asarray(documents)


def value_and_gradients(attend, tensors, documents):
    """The context without padding, and the gradients of query, key and value."""
    *inputs, weights = tensors
    weights = weights * (documents > 0)[:, None, :, None]
    mask = causal_mask(jnp.arange(documents.shape[1])[None], documents)

    def loss(*inputs):
        context = attend(*inputs, mask, documents)
        return jnp.sum(context * weights), context * (documents > 0)[:, None, :, None]

    compute = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))
    (_, context), gradients = compute(*inputs)
    return [context, *gradients]


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_splash_attention_equals_causal_attention_within_documents(shape):
    tensors, documents = heads(shape)
    expected = value_and_gradients(select_attention(CPU), tensors, documents)

    def splash(query, key, value, mask, documents):
        return splash_attention(query, key, value, documents, interpret=True)

    found = value_and_gradients(splash, tensors, documents)
    for x, y in zip(found, expected, strict=True):
        assert x.shape == y.shape
        assert jnp.linalg.norm(x - y) < 1e-5 * jnp.linalg.norm(y)


# Rows of documents, and whether causality alone hides what a token may not see.
DOCUMENTS = {
    "full": ([[1] * 24, [1] * 24], True),
    "padding on the right": ([[1] * 24, [1] * 15 + [0] * 9], True),
    "only padding": ([[1] * 24, [0] * 24], True),
    "padding on the left": ([[1] * 24, [0] * 9 + [1] * 15], False),
    "padding in the middle": ([[1] * 24, [1] * 9 + [0] * 5 + [1] * 10], False),
    "packed documents": ([[1] * 10 + [2] * 14, [1] * 24], False),
    "packed documents, padding": ([[1] * 10 + [2] * 8 + [0] * 6, [1] * 24], False),
}


@pytest.fixture
def kernels_in_xla(monkeypatch):
    """JAX's XLA implementation replaces the kernel of cuDNN, which needs a GPU.

    Returns:
        A list of the masks that it was called with.
    """
    original, masks = jax.nn.dot_product_attention, []

    def in_xla(query, key, value, *, implementation, mask, **options):
        assert implementation == "cudnn"
        assert query.dtype == "bfloat16"
        assert options["is_causal"]  # Otherwise the kernel would compute masked blocks.
        assert query.shape[-1] % 8 == 0 and query.shape[1] % 2 == 0
        masks.append(mask)
        return original(query, key, value, mask=mask, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", in_xla)
    return masks


@pytest.mark.parametrize(("documents", "sufficient"), DOCUMENTS.values(), ids=DOCUMENTS)
def test_is_causality_sufficient_for_one_document_with_padding_after_it(
    documents, sufficient
):
    assert is_causality_sufficient(jnp.array(documents)).item() == sufficient


@pytest.mark.parametrize("documents", [d for d, _ in DOCUMENTS.values()], ids=DOCUMENTS)
def test_cudnn_attention_equals_causal_attention_on_real_tokens(
    documents, kernels_in_xla
):
    tensors, _ = heads((4, 2, 100, 24), "bfloat16")
    documents = jnp.array(documents)
    found = value_and_gradients(select_attention(GPU), tensors, documents)
    assert {mask is None for mask in kernels_in_xla} == {True, False}
    expected = value_and_gradients(select_attention(CPU), tensors, documents)
    for x, y in zip(found, expected, strict=True):
        x, y = x.astype("float32"), y.astype("float32")
        assert jnp.linalg.norm(x - y) < 0.02 * jnp.linalg.norm(y)


@pytest.mark.parametrize("documents", ["padding on the right", "padding on the left"])
def test_cudnn_attention_selects_the_kernel_before_it_runs_outside_of_jit(
    documents, kernels_in_xla
):
    documents, sufficient = DOCUMENTS[documents]
    (*tensors, _), _ = heads((4, 2, 100, 24), "bfloat16")
    documents = jnp.array(documents)
    mask = causal_mask(jnp.arange(24)[None], documents)
    found = cudnn_attention(*tensors, mask, documents)
    assert [used is None for used in kernels_in_xla] == [sufficient]
    real = np.asarray(documents) > 0
    found, expected = (
        np.asarray(x.astype("float32")).swapaxes(1, 2)[real]
        for x in (found, causal_attention(*tensors, mask))
    )
    np.testing.assert_allclose(found, expected, atol=0.02)


@pytest.mark.parametrize(("length", "head_dim"), [(24, 100), (23, 100), (24, 136)])
def test_cudnn_prefill_attention_equals_causal_attention(
    length, head_dim, kernels_in_xla
):
    (*tensors, _), _ = heads((4, 2, head_dim, length), "bfloat16")
    assert select_prefill_attention(GPU) is cudnn_prefill_attention
    found = cudnn_prefill_attention(*tensors).astype("float32")
    assert kernels_in_xla == ([None] if (length, head_dim) == (24, 100) else [])
    mask = causal_mask(jnp.arange(length)[None])
    expected = causal_attention(*tensors, mask).astype("float32")
    assert jnp.linalg.norm(found - expected) < 0.02 * jnp.linalg.norm(expected)


@pytest.mark.parametrize(
    ("dtype", "length", "head_dim", "gpu"),
    [
        ("float32", 24, 16, GPU),
        ("bfloat16", 23, 16, GPU),
        ("bfloat16", 24, 136, GPU),
        ("bfloat16", 24, 16, OLD_GPU),
        ("bfloat16", 24, 16, ROCM),
    ],
    ids=["float32", "an odd length", "large heads", "an old GPU", "ROCm"],
)
def test_select_attention_falls_back_to_xla_without_a_kernel_of_cudnn(
    dtype, length, head_dim, gpu
):
    (query, key, value, _), documents = heads((2, 2, head_dim, length), dtype)
    mask = causal_mask(jnp.arange(length)[None], documents)
    expected = causal_attention(query, key, value, mask)
    found = select_attention(gpu)(query, key, value, mask, documents)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("gpu", [OLD_GPU, ROCM], ids=["an old GPU", "ROCm"])
def test_select_prefill_attention_is_none_without_cudnn(gpu):
    assert select_prefill_attention(gpu) is None


def kernels_of(program):
    """Names of the TPU kernels in a program that is lowered for TPUs."""
    text = program.lower(lowering_platforms=("tpu",)).as_text()
    return set(re.findall(r'kernel_name = "([^"]*)"', text))


def test_select_attention_compiles_splash_kernels_for_tpus():
    tensors, documents = heads((2, 1, 100, 256), "bfloat16")
    attend = select_attention(TPU)

    def loss(*inputs):
        return attend(*inputs, None, documents).astype("float32").sum()

    kernels = kernels_of(jax.jit(jax.grad(loss, (0, 1, 2))).trace(*tensors[:3]))
    assert len(kernels) == 2
    assert {"fwd", "dkv"} == {re.search("fwd|dkv", name)[0] for name in kernels}
    cpu = select_attention(CPU)
    assert not kernels_of(
        jax.jit(lambda *x: cpu(*x, jnp.ones((1, 1, 256, 256), bool), documents)).trace(
            *tensors[:3]
        )
    )
