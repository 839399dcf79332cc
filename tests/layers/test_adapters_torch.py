"""The product with adapters on PyTorch, and its gradients."""

import keras
import pytest

if keras.config.backend() != "torch":
    pytest.skip("Needs PyTorch.", allow_module_level=True)

import torch

from keras_openllama.layers.adapters_torch import add_adapters


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


def test_add_adapters_computes_no_gradient_of_frozen_tensors():
    ones = torch.ones(3, 2)
    a, b = torch.ones(2, 1, requires_grad=True), torch.ones(1, 2, requires_grad=True)
    add_adapters(ones, ones, a, b, 1.0).sum().backward()
    assert ones.grad is None
    assert a.grad.is_contiguous()  # As the fused optimizer needs it.
