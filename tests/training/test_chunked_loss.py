"""The chunked loss equals the cross-entropy of all logits, and so do its gradients."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from keras_openllama.training import chunked_loss
from keras_openllama.training.chunked_loss import (
    chunked_cross_entropy,
    chunked_cross_entropy_of_head,
)

# It is JAX on every backend.
pytestmark = [pytest.mark.backend_free, pytest.mark.usefixtures("compile_fast")]

BATCH, LENGTH, WIDTH, VOCABULARY = 3, 12, 16, 50


def inputs(length=LENGTH, dtype="float32", scale=1.0):
    """Hidden states, kernel, targets, and weights with zeros and fractions."""
    random = np.random.default_rng(0)
    hidden = scale * random.normal(size=(BATCH, length, WIDTH))
    kernel = random.normal(size=(VOCABULARY, WIDTH))
    targets = random.integers(0, VOCABULARY, (BATCH, length))
    weights = random.choice([0, 0.25, 1, 3], (BATCH, length))
    return (
        *(jnp.asarray(hidden, dtype), jnp.asarray(kernel, dtype)),
        *(jnp.asarray(targets, "int32"), jnp.asarray(weights, "float32")),
    )


def plain_loss(hidden, kernel, targets, weights):
    """The sums from all logits, in float32."""
    hidden, kernel = hidden.astype("float32"), kernel.astype("float32")
    logits = jnp.einsum("btd,vd->btv", hidden, kernel)
    log_normalizer = jax.nn.logsumexp(logits, axis=-1)
    chosen = jax.nn.log_softmax(logits)[
        jnp.arange(len(logits))[:, None], jnp.arange(logits.shape[1]), targets
    ]
    right = jnp.argmax(logits, axis=-1) == targets
    return chunked_loss.LossSums(
        loss=jnp.sum(-chosen * weights),
        z=jnp.sum(log_normalizer**2 * weights),
        correct=jnp.sum(right * weights),
    )


def gradients(hidden, kernel, targets, weights, z_loss=0.0, num_chunks=None):
    """Gradients with respect to hidden states and kernel."""
    return jax.grad(
        lambda *x: chunked_cross_entropy(*x, targets, weights, z_loss, num_chunks).loss,
        (0, 1),
    )(hidden, kernel)


def plain_gradients(hidden, kernel, targets, weights, z_loss=0.0):
    def loss(*x):
        sums = plain_loss(*x, targets, weights)
        return sums.loss + z_loss * sums.z

    return jax.grad(loss, (0, 1))(hidden, kernel)


def relative_error(actual, expected):
    """Norm of the difference, relative to the norm of the reference."""
    actual, expected = (np.asarray(x, "float64") for x in (actual, expected))
    assert actual.shape == expected.shape
    return np.linalg.norm(actual - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize("chunks", [1, 2, LENGTH, None])
@pytest.mark.parametrize("scale", [1, 100])  # With 100, exp of a logit is infinite.
def test_chunked_cross_entropy_equals_the_loss_of_all_logits(chunks, scale):
    batch = inputs(scale=scale)
    sums = chunked_cross_entropy(*batch, num_chunks=chunks)
    np.testing.assert_allclose(sums, plain_loss(*batch), rtol=1e-5)
    assert {x.dtype for x in sums} == {jnp.dtype("float32")}


@pytest.mark.parametrize("z_loss", [0.0, 0.1])
@pytest.mark.parametrize("chunks", [1, 2, LENGTH, None])
def test_chunked_gradients_equal_those_of_all_logits(chunks, z_loss):
    batch = inputs()
    expected = plain_gradients(*batch, z_loss)
    for x, y in zip(gradients(*batch, z_loss, chunks), expected, strict=True):
        assert relative_error(x, y) < 1e-5


def test_z_loss_is_not_included_in_the_loss():
    batch = inputs()
    assert chunked_cross_entropy(*batch, z_loss=0.5) == chunked_cross_entropy(*batch)


def test_sums_are_the_same_with_gradients():
    hidden, kernel, *rest = inputs()
    alone = chunked_cross_entropy(hidden, kernel, *rest, 0.1, 2)

    def loss(kernel):
        sums = chunked_cross_entropy(hidden, kernel, *rest, 0.1, 2)
        return sums.loss / 7, sums

    gradient, sums = jax.grad(loss, has_aux=True)(kernel)
    np.testing.assert_allclose(sums, alone, rtol=1e-6)
    _, expected = gradients(hidden, kernel, *rest, 0.1, 2)
    assert relative_error(gradient, expected / 7) < 1e-6  # The chain rule holds.


@pytest.mark.parametrize("part", ["z", "correct"])
def test_only_the_loss_has_a_gradient(part):
    hidden, *rest = inputs()
    gradient = jax.grad(lambda x: getattr(chunked_cross_entropy(x, *rest), part))(
        hidden
    )
    assert not gradient.any()


def test_bfloat16_errors_are_within_its_rounding():
    batch = inputs(dtype="bfloat16")
    sums, expected = chunked_cross_entropy(*batch, num_chunks=2), plain_loss(*batch)
    np.testing.assert_allclose(sums, expected, rtol=1e-5)  # Logits are float32.
    for x, y in zip(
        gradients(*batch, num_chunks=2), plain_gradients(*batch), strict=True
    ):
        assert x.dtype == "bfloat16"
        assert relative_error(x, y) < 2**-8


def test_kernel_gradient_is_accumulated_in_float32():
    # 1024 equal chunks: a sum in bfloat16 stops growing at the 256th.
    hidden, kernel, targets, weights = inputs(length=1, dtype="bfloat16")
    many = [jnp.tile(x, (1, 1024) + (1,) * (x.ndim - 2)) for x in (targets, weights)]
    _, once = gradients(hidden, kernel, targets, weights)
    hidden = jnp.tile(hidden, (1, 1024, 1))
    _, gradient = gradients(hidden, kernel, *many, num_chunks=1024)
    assert relative_error(gradient / 1024, once) < 2**-8


@pytest.mark.parametrize("limit", [1 << 20, 3 * BATCH * VOCABULARY, 1])
def test_chunks_of_a_prime_length(monkeypatch, limit):
    monkeypatch.setattr(chunked_loss, "LOGITS_PER_CHUNK", limit)
    batch = inputs(length=7)
    np.testing.assert_allclose(
        chunked_cross_entropy(*batch), plain_loss(*batch), rtol=1e-5
    )
    for x, y in zip(gradients(*batch), plain_gradients(*batch), strict=True):
        assert relative_error(x, y) < 1e-5


@pytest.mark.parametrize("positions_at_once", [1, 4, LENGTH])
def test_logits_in_memory_are_limited(monkeypatch, positions_at_once):
    limit = positions_at_once * BATCH * VOCABULARY
    monkeypatch.setattr(chunked_loss, "LOGITS_PER_CHUNK", limit)
    program = str(jax.make_jaxpr(lambda *batch: gradients(*batch))(*inputs()))
    shapes = [
        [int(size) for size in shape.split(",")]
        for shape in re.findall(r"\[([\d,]+)\]", program)
    ]
    sizes = [math.prod(shape) for shape in shapes if shape[-1] == VOCABULARY]
    assert max(sizes) == limit


def test_correct_is_the_weight_of_targets_with_the_largest_logit():
    hidden, kernel, _, weights = inputs()
    best = jnp.argmax(hidden @ kernel.T, axis=-1).astype("int32")
    assert chunked_cross_entropy(hidden, kernel, best, weights).correct == weights.sum()
    wrong = (best + 1) % VOCABULARY
    assert chunked_cross_entropy(hidden, kernel, wrong, weights).correct == 0
    some = best.at[0].set(wrong[0])
    sums = chunked_cross_entropy(hidden, kernel, some, weights, num_chunks=3)
    assert sums.correct == weights[1:].sum()


def test_loss_and_gradients_without_targets_are_zero():
    hidden, kernel, targets, weights = inputs()
    batch = hidden, kernel, targets, jnp.zeros_like(weights)
    assert chunked_cross_entropy(*batch, z_loss=0.1) == chunked_loss.LossSums(0, 0, 0)
    for gradient in gradients(*batch, z_loss=0.1):
        assert not gradient.any()


@pytest.mark.parametrize("chunks", [1, 3, None])
def test_chunked_cross_entropy_of_head_equals_the_loss_of_all_logits(chunks):
    hidden, kernel, targets, weights = inputs()

    def loss(hidden, kernel):
        sums = chunked_cross_entropy_of_head(
            lambda x: x @ kernel.T, hidden, targets, weights, 0.1, chunks
        )
        return sums.loss, sums

    found, sums = jax.grad(loss, (0, 1), has_aux=True)(hidden, kernel)
    np.testing.assert_allclose(
        sums, plain_loss(hidden, kernel, targets, weights), rtol=1e-5
    )
    expected = plain_gradients(hidden, kernel, targets, weights, z_loss=0.1)
    for gradient, plain in zip(found, expected, strict=True):
        assert relative_error(gradient, plain) < 1e-5
