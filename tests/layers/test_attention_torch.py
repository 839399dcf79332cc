"""Fused attention: PyTorch's in blocks of queries, with a mask for all layers; ours."""

import keras
import numpy as np
import pytest

if keras.config.backend() != "torch":
    pytest.skip("Needs PyTorch.", allow_module_level=True)

import torch
import torch.utils.checkpoint

from keras_openllama.layers import (
    attention_torch,
    compiled_attention_torch,
    heads_torch,
    rotation_torch,
)
from keras_openllama.layers.attention import causal_mask, dot_product_attention
from keras_openllama.layers.attention_torch import FusedAttention
from keras_openllama.native.library import native_library

needs_compiler = pytest.mark.skipif(
    native_library() is None, reason="the library is not compiled on this system"
)


@pytest.fixture
def no_library(monkeypatch):
    monkeypatch.setattr(heads_torch, "native_library", lambda: None)


def random(*shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator)


def documents(length):
    """Two documents, and padding at the end or at the start."""
    index = np.minimum(np.arange(length), 5) // 5 + 1
    return np.stack([index, index]) * (np.arange(length) > [[-1], [2]])


@pytest.mark.parametrize(("heads", "head_dim"), [(2, 100), (6, 8)])
@pytest.mark.parametrize("block", [4, 11, 192])
def test_fused_attention_in_blocks_equals_dot_product_attention(
    heads, head_dim, block, monkeypatch, no_library
):
    monkeypatch.setattr(attention_torch, "QUERY_BLOCK", block)
    assert_equals_dot_product_attention(heads, head_dim, length=11)


@needs_compiler
@pytest.mark.parametrize(("heads", "head_dim"), [(2, 100), (6, 8)])
@pytest.mark.parametrize("length", [11, 130])
def test_fused_attention_by_the_compiled_function_equals_dot_product_attention(
    heads, head_dim, length, monkeypatch
):
    monkeypatch.setattr(attention_torch, "_attend", None)
    assert_equals_dot_product_attention(heads, head_dim, length)


def assert_equals_dot_product_attention(heads, head_dim, length):
    query = random(2, heads, length, head_dim, seed=0).requires_grad_()
    key, value = (
        random(2, 2, length, head_dim, seed=s).requires_grad_() for s in (1, 2)
    )
    index = documents(length)
    mask = torch.tensor(causal_mask(np.arange(length)[None], index))
    real = torch.tensor(index > 0)[:, None, :, None]  # Nothing uses other outputs.
    found, expected = (
        attend(query, key, value, mask) * real
        for attend in (FusedAttention(), dot_product_attention)
    )
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    slopes = random(2, heads, length, head_dim, seed=3)
    torch.testing.assert_close(
        torch.autograd.grad(found, (query, key, value), slopes),
        torch.autograd.grad(expected, (query, key, value), slopes),
        rtol=1e-5,
        atol=1e-5,
    )


def test_fused_attention_converts_a_mask_once(monkeypatch, no_library):
    converted = []
    convert = attention_torch._bias
    monkeypatch.setattr(
        attention_torch, "_bias", lambda *args: converted.append(1) or convert(*args)
    )
    x, attend = random(1, 2, 3, 8, seed=0), FusedAttention()
    mask = torch.tensor(causal_mask(np.arange(3)[None]))
    first = attend(x, x, x, mask)
    assert torch.equal(attend(x, x, x, mask), first)
    assert len(converted) == 1
    visible = torch.ones_like(mask)
    assert not torch.equal(attend(x, x, x, visible), first)


def test_head_padding_does_not_change_fused_attention(monkeypatch, no_library):
    q, k, v = (random(2, 3, 5, 100, seed=s) for s in range(3))
    index = np.array([[1, 1, 1, 2, 2], [1, 1, 1, 1, 0]])
    mask = torch.as_tensor(causal_mask(np.arange(5)[None], index))
    expected = FusedAttention()(q, k, v, mask)
    assert attention_torch.head_padding(100, "cuda") == 4
    assert attention_torch.head_padding(100, "cpu") == 0
    assert attention_torch.head_padding(64, "cuda") == 0
    monkeypatch.setattr(attention_torch, "head_padding", lambda *_: 4)
    found = FusedAttention()(q, k, v, mask)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@needs_compiler
def test_compiled_attention_gives_the_same_bits_with_any_number_of_threads():
    threads, results = torch.get_num_threads(), []
    mask = torch.ones(1, 1, 150, 150, dtype=torch.bool).tril()
    for count in (1, 3):
        torch.set_num_threads(count)
        tensors = [random(2, 4, 150, 64, seed=s).requires_grad_() for s in range(3)]
        context = FusedAttention()(*tensors, mask)
        context.square().sum().backward()
        results.append([context, *(x.grad for x in tensors)])
    torch.set_num_threads(threads)
    assert all(map(torch.equal, *results))


@needs_compiler
def test_compiled_attention_takes_tensors_in_any_order_of_axes():
    mask = torch.ones(1, 1, 9, 9, dtype=torch.bool).tril()
    tensors = [random(2, 4, 9, 8, seed=s) for s in range(3)]
    others = [x.permute(3, 2, 0, 1).contiguous().permute(2, 3, 1, 0) for x in tensors]
    assert torch.equal(
        FusedAttention()(*others, mask.expand(2, 1, 9, 9)),
        FusedAttention()(*tensors, mask),
    )


def test_is_compiled_in_float32_on_cpus_only():
    mask = torch.ones(1, 1, 3, 3, dtype=torch.bool)
    x = random(1, 2, 3, 8, seed=0)
    is_compiled = compiled_attention_torch.is_compiled
    assert is_compiled(x, x, x, mask) == (native_library() is not None)
    other = x.to(torch.bfloat16)
    assert not is_compiled(other, other, other, mask)
    assert not is_compiled(x, other, other, mask)
    assert not is_compiled(*(x.to("meta"),) * 3, mask)
    assert not is_compiled(x, x, x, mask[0, 0])
    with torch.autocast("cpu", torch.bfloat16):
        assert not is_compiled(x, x, x, mask)


@needs_compiler
def test_compiled_attention_and_rotation_work_in_checkpoints(monkeypatch):
    monkeypatch.setattr(rotation_torch, "MIN_ELEMENTS", 0)
    mask = torch.ones(1, 1, 9, 9, dtype=torch.bool).tril()
    table = random(1, 1, 9, 4, seed=5)

    def attend(*tensors):
        rotated = [rotation_torch.compiled_rotate(x, table, table) for x in tensors]
        return FusedAttention()(*rotated, mask)

    results = []
    for checkpoint in (lambda f, *x: f(*x), torch.utils.checkpoint.checkpoint):
        tensors = [random(2, 4, 9, 8, seed=s).requires_grad_() for s in range(3)]
        options = {} if results == [] else {"use_reentrant": False}
        checkpoint(attend, *tensors, **options).square().sum().backward()
        results.append([x.grad for x in tensors])
    assert all(map(torch.equal, *results))


@needs_compiler
def test_attention_in_function_transforms_is_of_pytorch():
    mask = torch.ones(1, 1, 9, 9, dtype=torch.bool).tril()
    key, value = random(2, 4, 9, 8, seed=1), random(2, 4, 9, 8, seed=2)

    def loss(query):
        return FusedAttention()(query, key, value, mask).square().sum()

    query = random(2, 4, 9, 8, seed=0)
    found = torch.func.grad(loss)(query)
    loss(query.requires_grad_()).backward()
    torch.testing.assert_close(found, query.grad, rtol=1e-4, atol=1e-5)


@needs_compiler
def test_attention_broadcasts_masks():
    tensors = [random(2, 4, 9, 8, seed=s) for s in range(3)]
    mask = torch.ones(9, 9, dtype=torch.bool).tril()
    expected = FusedAttention()(*tensors, mask[None, None])
    for other in (mask, mask[None], mask[None, None].expand(2, 4, 9, 9)):
        torch.testing.assert_close(FusedAttention()(*tensors, other), expected)
