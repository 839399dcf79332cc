"""`chunked_cross_entropy` on PyTorch equals the loss of all logits at once."""

import keras
import pytest

if keras.config.backend() != "torch":
    pytest.skip("Needs PyTorch.", allow_module_level=True)

import torch

from keras_openllama.training import chunked_loss_torch
from keras_openllama.training.chunked_loss_torch import chunked_cross_entropy

BATCH, LENGTH, SIZE, VOCABULARY = 3, 5, 8, 17


@pytest.fixture(params=[7, 15, 10**6], ids="rows of a chunk: {}".format)
def rows(request, monkeypatch):
    size = request.param * VOCABULARY
    monkeypatch.setattr(chunked_loss_torch, "LOGITS_PER_CHUNK", size)


def inputs(dtype=torch.float32, scale=1.0):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator) * scale

    hidden = normal(BATCH, LENGTH, SIZE).to(dtype).requires_grad_()
    kernel = normal(VOCABULARY, SIZE).requires_grad_()
    targets = torch.randint(VOCABULARY, (BATCH, LENGTH), generator=generator)
    weights = torch.rand((BATCH, LENGTH), generator=generator)
    weights[0, :3] = 0
    return hidden, kernel, targets, weights


def expected(hidden, kernel, targets, weights):
    logits = (hidden @ kernel.to(hidden.dtype).T).float().flatten(0, 1)
    losses = torch.nn.functional.cross_entropy(
        logits, targets.flatten(), reduction="none"
    )
    correct = logits.argmax(-1) == targets.flatten()
    return (losses * weights.flatten()).sum(), (correct * weights.flatten()).sum()


@pytest.mark.usefixtures("rows")
@pytest.mark.parametrize("factor", [1.0, 1024.0])
@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_chunked_cross_entropy_has_the_values_and_gradients_of_all_logits(
    factor, scale
):
    arguments = inputs()
    objective, loss, correct = chunked_cross_entropy(*arguments, scale)
    gradients = torch.autograd.grad(factor / scale * objective, arguments[:2])
    expected_loss, expected_correct = expected(*arguments)
    torch.testing.assert_close(loss, expected_loss)
    torch.testing.assert_close(correct, expected_correct)
    torch.testing.assert_close(objective, scale * loss)
    assert not (loss.requires_grad or correct.requires_grad)
    for gradient, by_autograd in zip(
        gradients,
        torch.autograd.grad(factor * expected_loss, arguments[:2]),
        strict=True,
    ):
        torch.testing.assert_close(gradient, by_autograd, rtol=2e-5, atol=1e-5 * factor)


@pytest.mark.usefixtures("rows")
def test_chunked_cross_entropy_in_bfloat16_sums_the_kernels_gradient_in_float32():
    arguments = inputs(torch.bfloat16)
    objective, loss, _ = chunked_cross_entropy(*arguments)
    of_hidden, of_kernel = torch.autograd.grad(objective, arguments[:2])
    assert (of_hidden.dtype, of_kernel.dtype) == (torch.bfloat16, torch.float32)
    exact = [x.detach().float().requires_grad_() for x in arguments[:2]]
    exact_loss, _ = expected(*exact, *arguments[2:])
    torch.testing.assert_close(loss, exact_loss, rtol=1e-2, atol=0)
    for found, gradient in zip(
        (of_hidden, of_kernel), torch.autograd.grad(exact_loss, exact), strict=True
    ):
        error = (found.float() - gradient).norm() / gradient.norm()
        assert error < 1e-2


def test_chunked_cross_entropy_is_finite_where_a_target_has_the_probability_zero():
    arguments = inputs(scale=30.0)
    _, loss, _ = chunked_cross_entropy(*arguments)
    losses = expected(*arguments)[0]
    assert losses / BATCH / LENGTH > 104  # exp(-104) is 0 in float32.
    torch.testing.assert_close(loss, losses)


def test_chunked_cross_entropy_computes_only_the_gradients_that_are_needed():
    hidden, kernel, *others = inputs()
    objective, *_ = chunked_cross_entropy(hidden, kernel.detach(), *others)
    assert objective.grad_fn.gradients[1] is None
    with torch.no_grad():
        objective, *_ = chunked_cross_entropy(hidden, kernel, *others)
    assert objective.grad_fn is None
