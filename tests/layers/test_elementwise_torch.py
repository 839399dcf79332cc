"""Elementwise functions on PyTorch equal the plain formulas, and so do gradients."""

import keras
import pytest

if keras.config.backend() != "torch":
    pytest.skip("Needs PyTorch.", allow_module_level=True)

import torch

from keras_openllama.layers import elementwise_torch
from keras_openllama.layers.elementwise_torch import rms_norm, rotate, silu_times


def random(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype)


def outputs_and_gradients(function, *tensors):
    tensors = [x.detach().requires_grad_() for x in tensors]
    outputs = function(*tensors)
    slopes = random(*outputs.shape, seed=9, dtype=outputs.dtype)
    return [outputs, *torch.autograd.grad(outputs, tensors, slopes)]


def plain_rms_norm(x, scale):
    x = x.float()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-3) * scale


def plain_rotate(x, cos, sin):
    first, second = x.float().chunk(2, dim=-1)
    halves = first * cos - second * sin, second * cos + first * sin
    return torch.cat(halves, dim=-1).to(x.dtype)


@pytest.mark.parametrize("part", [elementwise_torch.PART, 70])
def test_silu_times_equals_the_formula(part, monkeypatch):
    monkeypatch.setattr(elementwise_torch, "PART", part)
    gate, up = random(2, 5, 30), random(2, 5, 30, seed=1)
    found = outputs_and_gradients(silu_times, gate, up)
    expected = outputs_and_gradients(
        lambda gate, up: torch.nn.functional.silu(gate) * up, gate, up
    )
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_equals_the_formula(dtype):
    x, scale = random(2, 5, 30, dtype=dtype), random(30, seed=1)
    found = outputs_and_gradients(lambda *xs: rms_norm(*xs, 1e-3), x, scale)
    expected = outputs_and_gradients(plain_rms_norm, x, scale)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [8, 100])
def test_rotate_equals_the_formula(head_dim, dtype):
    x = random(5, 2, 3, head_dim, dtype=dtype).transpose(0, 2)
    angles = random(1, 1, 5, head_dim // 2, seed=1)
    tables = angles.cos(), angles.sin()
    found = outputs_and_gradients(lambda x: rotate(x, *tables), x)
    expected = outputs_and_gradients(lambda x: plain_rotate(x, *tables), x)
    torch.testing.assert_close(found, expected)
