"""The loss by chunks is the plain cross-entropy of all logits, gradients too."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from keras_openllama.training import chunked_loss
from keras_openllama.training.chunked_loss import chunked_cross_entropy

pytestmark = pytest.mark.backend_free  # It is JAX, whatever Keras runs on.

pytestmark = pytest.mark.usefixtures("compile_fast")

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


def plainly(hidden, kernel, targets, weights):
    """The sums from all logits at once, in float32."""
    hidden, kernel = hidden.astype("float32"), kernel.astype("float32")
    logits = jnp.einsum("btd,vd->btv", hidden, kernel)
    normaliser = jax.nn.logsumexp(logits, axis=-1)
    chosen = jax.nn.log_softmax(logits)[
        jnp.arange(len(logits))[:, None], jnp.arange(logits.shape[1]), targets
    ]
    right = jnp.argmax(logits, axis=-1) == targets
    return chunked_loss.LossSums(
        loss=jnp.sum(-chosen * weights),
        z=jnp.sum(normaliser**2 * weights),
        correct=jnp.sum(right * weights),
    )


def gradients(hidden, kernel, targets, weights, z_scale=0.0, chunks=None):
    """Those by hidden states and kernel."""
    return jax.grad(
        lambda *x: chunked_cross_entropy(*x, targets, weights, z_scale, chunks).loss,
        (0, 1),
    )(hidden, kernel)


def plain_gradients(hidden, kernel, targets, weights, z_scale=0.0):
    def loss(*x):
        sums = plainly(*x, targets, weights)
        return sums.loss + z_scale * sums.z

    return jax.grad(loss, (0, 1))(hidden, kernel)


def distance(ours, theirs):
    """Norm of the difference, as a part of the norm of the reference."""
    ours, theirs = (np.asarray(x, "float64") for x in (ours, theirs))
    assert ours.shape == theirs.shape
    return np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)


@pytest.mark.parametrize("chunks", [1, 2, LENGTH, None])
@pytest.mark.parametrize("scale", [1, 100])  # With 100, exp of a logit is infinite.
def test_sums_are_those_of_all_logits(chunks, scale):
    batch = inputs(scale=scale)
    sums = chunked_cross_entropy(*batch, chunks=chunks)
    np.testing.assert_allclose(sums, plainly(*batch), rtol=1e-5)
    assert {x.dtype for x in sums} == {jnp.dtype("float32")}


@pytest.mark.parametrize("z_scale", [0.0, 0.1])
@pytest.mark.parametrize("chunks", [1, 2, LENGTH, None])
def test_gradients_are_those_of_all_logits(chunks, z_scale):
    batch = inputs()
    expected = plain_gradients(*batch, z_scale)
    for x, y in zip(gradients(*batch, z_scale, chunks), expected, strict=True):
        assert distance(x, y) < 1e-5


def test_the_z_loss_is_not_in_the_loss_that_is_told():
    batch = inputs()
    assert chunked_cross_entropy(*batch, z_scale=0.5) == chunked_cross_entropy(*batch)


def test_sums_are_the_same_beside_gradients():
    hidden, kernel, *rest = inputs()
    alone = chunked_cross_entropy(hidden, kernel, *rest, 0.1, 2)

    def loss(kernel):
        sums = chunked_cross_entropy(hidden, kernel, *rest, 0.1, 2)
        return sums.loss / 7, sums

    gradient, sums = jax.grad(loss, has_aux=True)(kernel)
    np.testing.assert_allclose(sums, alone, rtol=1e-6)
    _, whole = gradients(hidden, kernel, *rest, 0.1, 2)
    assert distance(gradient, whole / 7) < 1e-6  # The chain rule holds.


@pytest.mark.parametrize("part", ["z", "correct"])
def test_only_the_loss_has_a_gradient(part):
    hidden, *rest = inputs()
    gradient = jax.grad(lambda x: getattr(chunked_cross_entropy(x, *rest), part))(
        hidden
    )
    assert not gradient.any()


def test_bfloat16_costs_no_more_than_its_rounding():
    batch = inputs(dtype="bfloat16")
    sums, expected = chunked_cross_entropy(*batch, chunks=2), plainly(*batch)
    np.testing.assert_allclose(sums, expected, rtol=1e-5)  # Logits are float32.
    for x, y in zip(gradients(*batch, chunks=2), plain_gradients(*batch), strict=True):
        assert x.dtype == "bfloat16"
        assert distance(x, y) < 2**-8


def test_the_gradient_of_the_kernel_adds_up_in_float32():
    # 1024 equal chunks: a sum in bfloat16 stops growing at the 256th.
    hidden, kernel, targets, weights = inputs(length=1, dtype="bfloat16")
    many = [jnp.tile(x, (1, 1024) + (1,) * (x.ndim - 2)) for x in (targets, weights)]
    _, once = gradients(hidden, kernel, targets, weights)
    hidden = jnp.tile(hidden, (1, 1024, 1))
    _, gradient = gradients(hidden, kernel, *many, chunks=1024)
    assert distance(gradient / 1024, once) < 2**-8


@pytest.mark.parametrize("limit", [1 << 20, 3 * BATCH * VOCABULARY, 1])
def test_a_length_that_only_one_divides(monkeypatch, limit):
    monkeypatch.setattr(chunked_loss, "LOGITS_PER_CHUNK", limit)
    batch = inputs(length=7)
    np.testing.assert_allclose(
        chunked_cross_entropy(*batch), plainly(*batch), rtol=1e-5
    )
    for x, y in zip(gradients(*batch), plain_gradients(*batch), strict=True):
        assert distance(x, y) < 1e-5


@pytest.mark.parametrize("positions_at_once", [1, 4, LENGTH])
def test_no_more_logits_than_the_limit_are_there_at_once(
    monkeypatch, positions_at_once
):
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
    sums = chunked_cross_entropy(hidden, kernel, some, weights, chunks=3)
    assert sums.correct == weights[1:].sum()


def test_without_targets_there_is_nothing():
    hidden, kernel, targets, weights = inputs()
    batch = hidden, kernel, targets, jnp.zeros_like(weights)
    assert chunked_cross_entropy(*batch, z_scale=0.1) == chunked_loss.LossSums(0, 0, 0)
    for gradient in gradients(*batch, z_scale=0.1):
        assert not gradient.any()
