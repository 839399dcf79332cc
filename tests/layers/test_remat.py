"""Rematerialization saves fewer activations and changes nothing else."""

import collections
import contextlib
import dataclasses
import functools
import io
import re

import keras
import numpy as np
import pytest
from tensorflow_marks import first_on_tensorflow
from tiny_models import SHAPES, batch, random_lm

from keras_openllama.config import REMATERIALIZATION
from keras_openllama.layers.execution import LayerExecution
from keras_openllama.layers.remat import check_policy, recompute_in_backward

ON_JAX = keras.config.backend() == "jax"
if ON_JAX:
    import jax

on_jax = pytest.mark.skipif(not ON_JAX, reason="Needs JAX.")
# The feed-forward width differs, so that saved activations can be distinguished.
SHAPE = dataclasses.replace(SHAPES[2], intermediate_dim=128)
BATCH, LENGTH = 2, 64


@pytest.fixture(scope="module")
def lm():
    return random_lm(SHAPE)


def loss_of(lm, policy, scan=False):
    """Returns a scalar function of the weights, and the weights."""
    ids = batch(SHAPE, BATCH, LENGTH)
    states = np.random.default_rng(0).normal(size=(BATCH, LENGTH, SHAPE.hidden_dim))

    def loss(values):
        mapping = zip(lm.backbone.trainable_variables, values, strict=True)
        with keras.StatelessScope(state_mapping=mapping):
            hidden = lm.backbone.hidden_states(
                ids, np.ones_like(ids), execution=LayerExecution(policy, scan=scan)
            )
        return jax.numpy.sum(hidden * states)

    return loss, [v.value for v in lm.backbone.trainable_variables]


def saved_shapes(lm, policy):
    """Shapes of the activations that the forward pass saves for the backward pass."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        jax.ad_checkpoint.print_saved_residuals(*loss_of(lm, policy))
    found = re.findall(r"^\w+\[([\d,]+)\]", printed.getvalue(), re.MULTILINE)
    shapes = [tuple(map(int, shape.split(","))) for shape in found]
    return [shape for shape in shapes if len(shape) > 2]


def compiled(lm, policy, scan=False):
    """Returns the compiled gradient."""
    loss, values = loss_of(lm, policy, scan)
    return jax.jit(jax.grad(loss)).lower(values).compile()


@pytest.fixture(scope="module")
def programs(lm):
    return {policy: compiled(lm, policy) for policy in REMATERIALIZATION}


@on_jax
@first_on_tensorflow("policy", ["products", "projections", "full"])
def test_rematerialization_does_not_change_gradients(lm, programs, policy):
    _, values = loss_of(lm, policy)
    pairs = zip(programs[policy](values), programs["none"](values), strict=True)
    for found, expected in pairs:
        difference = np.linalg.norm(found - expected)
        assert difference <= 1e-6 * np.linalg.norm(expected)


@on_jax
def test_each_remat_policy_saves_fewer_activations_than_the_last(lm):
    sizes = [
        sum(map(np.prod, saved_shapes(lm, policy))) for policy in REMATERIALIZATION
    ]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == len(
        REMATERIALIZATION
    )


@on_jax
def test_rematerialization_recomputes_in_the_compiled_program(programs):
    # XLA must not eliminate the recomputation as a common subexpression.
    operations = {
        p: program.cost_analysis()["flops"] for p, program in programs.items()
    }
    tokens, layers = BATCH * LENGTH, SHAPE.num_layers
    gate_and_up = 2 * 2 * tokens * SHAPE.hidden_dim * SHAPE.intermediate_dim * layers
    # Operations other than matrix products are few.
    assert operations["products"] < operations["none"] + gate_and_up / 4
    assert operations["projections"] > operations["none"] + gate_and_up
    assert operations["full"] > 1.1 * operations["projections"]


@on_jax
@pytest.mark.parametrize("scan", [pytest.param(False, marks=pytest.mark.slow), True])
def test_rematerialization_reduces_the_memory_of_the_program(scan):
    # XLA must not recompute activations before they are needed.
    deep = random_lm(dataclasses.replace(SHAPE, num_layers=8))
    sizes = [
        compiled(deep, policy, scan).memory_analysis().temp_size_in_bytes
        for policy in REMATERIALIZATION
    ]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] < sizes[0] / 2


@on_jax
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_recompute_in_backward_keeps_finite_gradients_finite(dtype):
    x = jax.numpy.linspace(-1, 1, 8, dtype=dtype)
    largest = jax.numpy.full_like(x, jax.numpy.finfo(dtype).max)

    @functools.partial(jax.jit, static_argnums=0)
    def gradient(block):
        return jax.vjp(block, x)[1](largest)[0]

    found = gradient(recompute_in_backward(jax.numpy.sin))
    assert np.isfinite(found).all()
    assert (found == gradient(jax.numpy.sin)).all()


@on_jax
@pytest.mark.parametrize("policy", REMATERIALIZATION)
def test_no_remat_policy_saves_attention_weights(lm, policy):
    # Only the mask, which all layers share, has the shape `(length, length)`.
    squares = [
        shape for shape in saved_shapes(lm, policy) if shape[-2:] == (LENGTH, LENGTH)
    ]
    assert squares == [(BATCH, 1, LENGTH, LENGTH)]


@on_jax
def test_remat_policies_save_the_activations_they_name(lm):
    head_dim = SHAPE.head_dim
    queries = (BATCH, SHAPE.num_query_heads, LENGTH, head_dim)
    keys = (BATCH, SHAPE.num_key_value_heads, LENGTH, head_dim)
    states = (BATCH, LENGTH, SHAPE.hidden_dim)
    wide = (BATCH, LENGTH, SHAPE.intermediate_dim)
    layers = SHAPE.num_layers
    found = {
        policy: collections.Counter(saved_shapes(lm, policy))
        for policy in ("products", "projections", "full")
    }
    for policy in ("products", "projections"):
        assert found[policy][queries] == 2 * layers  # Query, attention.
        assert found[policy][keys] == 2 * layers  # Key, value.
        assert found[policy][states] - found["full"][states] == layers
    assert found["products"][wide] == 2 * layers  # Gate and up.
    assert found["projections"][wide] == 0
    assert found["full"][queries] == found["full"][keys] == 0


@pytest.mark.parametrize("policy", ["half", "", None, "Full"])
def test_check_policy_rejects_unknown_policies_and_lists_the_known(lm, policy):
    message = f"none, products, projections, full. Received: {policy!r}"
    with pytest.raises(ValueError, match=message):
        check_policy(policy)
    with pytest.raises(ValueError, match=message):
        lm.compile(rematerialize=policy)
    ids = batch(SHAPE, 1, 4)
    with pytest.raises(ValueError, match=message):
        lm.backbone.hidden_states(
            ids, np.ones_like(ids), execution=LayerExecution(policy)
        )


@pytest.mark.skipif(ON_JAX, reason="JAX supports it.")
@pytest.mark.parametrize("policy", ["products", "projections", "full"])
def test_check_policy_needs_jax(lm, policy):
    check_policy("none")
    ids = batch(SHAPE, 1, 4)
    for call in (
        lambda: check_policy(policy),
        lambda: lm.compile(rematerialize=policy),
        lambda: lm.backbone.hidden_states(
            ids, np.ones_like(ids), execution=LayerExecution(policy)
        ),
    ):
        with pytest.raises(ValueError, match=f"{policy}.*needs the JAX backend"):
            call()
