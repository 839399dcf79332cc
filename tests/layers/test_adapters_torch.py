"""The product with adapters on PyTorch, and its gradients."""

import keras
import pytest

if keras.config.backend() != "torch":
    pytest.skip("Needs PyTorch.", allow_module_level=True)

import torch
from torch.utils.flop_counter import FlopCounterMode

from keras_openllama.layers.adapters_torch import add_adapters, can_add_adapters


@pytest.mark.parametrize("rows", [3, 200])
@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_add_adapters_and_its_gradients_equal_the_formula(rows, scale):
    generator = torch.Generator().manual_seed(0)
    shapes = (2, rows, 12), (2, rows, 100), (12, 4), (4, 100)
    tensors = [torch.randn(s, generator=generator).requires_grad_() for s in shapes]
    slopes = torch.randn(shapes[0], generator=generator)

    def plain(outputs, inputs, a, b):
        return outputs + scale * inputs @ b.T @ a.T

    found, expected = add_adapters(*tensors, scale), plain(*tensors)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(
        torch.autograd.grad(found, tensors, slopes),
        torch.autograd.grad(expected, tensors, slopes),
        rtol=1e-5,
        atol=1e-3,
    )


def backward_flops(frozen=None):
    shapes = (3, 5), (3, 6), (5, 2), (2, 6)
    tensors = [torch.ones(shape, requires_grad=True) for shape in shapes]
    if frozen is not None:
        tensors[frozen].requires_grad_(False)
    outputs = add_adapters(*tensors, 1.0).sum()
    with FlopCounterMode(display=False) as counter:
        outputs.backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("frozen, flops", [(1, 2 * 36), (2, 2 * 30), (3, 2 * 36)])
def test_add_adapters_computes_no_gradient_of_frozen_tensors(frozen, flops):
    assert backward_flops() - backward_flops(frozen) == flops


def test_add_adapters_has_contiguous_gradients_as_the_fused_optimizer_needs_them():
    a, b = torch.ones(5, 2, requires_grad=True), torch.ones(2, 6, requires_grad=True)
    outputs = add_adapters(torch.ones(3, 5), torch.ones(3, 6), a, b, 1.0)
    gradients = torch.autograd.grad(outputs.sum(), (a, b))
    assert all(x.is_contiguous() for x in gradients)


def test_add_adapters_is_not_for_slow_products():
    halves = torch.ones(2, 2, dtype=torch.bfloat16)
    assert can_add_adapters(torch.ones(2, 2))
    with torch.backends.mkldnn.flags(enabled=False):
        assert not can_add_adapters(halves)
    with torch.autocast("cpu", torch.bfloat16):
        assert not can_add_adapters(torch.ones(2, 2))
    with torch.no_grad():
        assert not can_add_adapters(torch.ones(2, 2))
