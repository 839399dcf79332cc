"""PyTorch's fused attention: blocks of queries, and a mask for all layers."""

import keras
import numpy as np
import pytest

if keras.config.backend() != "torch":
    pytest.skip("Needs PyTorch.", allow_module_level=True)

import torch

from keras_openllama.layers import attention_torch
from keras_openllama.layers.attention import causal_mask, dot_product_attention
from keras_openllama.layers.attention_torch import FusedAttention


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
    heads, head_dim, block, monkeypatch
):
    monkeypatch.setattr(attention_torch, "QUERY_BLOCK", block)
    query = random(2, heads, 11, head_dim, seed=0).requires_grad_()
    key, value = (random(2, 2, 11, head_dim, seed=s).requires_grad_() for s in (1, 2))
    index = documents(11)
    mask = torch.tensor(causal_mask(np.arange(11)[None], index))
    real = torch.tensor(index > 0)[:, None, :, None]  # Nothing uses other outputs.
    found, expected = (
        attend(query, key, value, mask) * real
        for attend in (FusedAttention(), dot_product_attention)
    )
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    slopes = random(2, heads, 11, head_dim, seed=3)
    torch.testing.assert_close(
        torch.autograd.grad(found, (query, key, value), slopes),
        torch.autograd.grad(expected, (query, key, value), slopes),
        rtol=1e-5,
        atol=1e-5,
    )


def test_fused_attention_converts_a_mask_once(monkeypatch):
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


def test_head_padding_does_not_change_fused_attention(monkeypatch):
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
