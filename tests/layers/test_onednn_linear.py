"""float32 products by oneDNN, their gradients, and what they save."""

import keras
import pytest

if keras.config.backend() != "torch":
    pytest.skip("Needs PyTorch.", allow_module_level=True)

import torch

from keras_openllama.layers import onednn_linear
from keras_openllama.layers.onednn_linear import multiply, uses_onednn


def tensors(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = (2, 150, 100), (12, 100), (2, 150, 12)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


@pytest.fixture(params=[True, False], ids=["onednn", "mkl"])
def slow_mkl(request, monkeypatch):
    if request.param and not torch.backends.mkldnn.is_available():
        pytest.skip("Needs oneDNN.")
    monkeypatch.setattr(onednn_linear, "_has_slow_mkl", lambda: request.param)
    return request.param


def test_multiply_and_its_gradients_equal_the_formula(slow_mkl):
    x, kernel, slopes = tensors()
    x, kernel = x.requires_grad_(), kernel.requires_grad_()
    assert uses_onednn(x) == slow_mkl
    found, expected = multiply(x, kernel), x @ kernel.T
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(
        torch.autograd.grad(found, (x, kernel), slopes),
        torch.autograd.grad(expected, (x, kernel), slopes),
        rtol=1e-5,
        atol=1e-3,
    )


def test_multiply_does_not_save_the_inputs_of_a_frozen_kernel(slow_mkl):
    x, kernel, _ = tensors()
    x.requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda x: x):
        multiply(x, kernel)
    assert saved and all(s.numel() == kernel.numel() for s in saved)


def test_uses_onednn_is_false_for_other_dtypes_and_where_it_is_disabled(monkeypatch):
    monkeypatch.setattr(onednn_linear, "_has_slow_mkl", lambda: True)
    x = torch.ones(2, 3)
    assert not uses_onednn(x.bfloat16())
    with torch.backends.mkldnn.flags(enabled=False):
        assert not uses_onednn(x)


def test_multiply_compiles_without_graph_breaks():
    inputs, kernel = torch.ones(200, 3), torch.ones(4, 3)
    compiled = torch.compile(multiply, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(inputs, kernel), inputs @ kernel.T)
