"""A scan over layers equals applying them in order (JAX)."""

import keras
import numpy as np
import pytest
from tiny_models import SHAPES, batch, random_lm

if keras.config.backend() != "jax":
    pytest.skip("Needs JAX.", allow_module_level=True)

import jax
import jax.numpy as jnp

from keras_openllama.layers.scan import functional_call, scan_layers
from keras_openllama.training.train_step_jax import TrainStepOptions, compute_gradients

THREE_LAYERS = SHAPES[3]  # Grouped heads of 100, too.


def loss_and_gradients(lm, ids, **options):
    x = {"token_ids": ids[:, :-1], "padding_mask": np.ones_like(ids[:, 1:])}
    weights = jnp.ones(ids[:, 1:].shape, "float32")

    def run(trainable, non_trainable):
        sums, total, grads = compute_gradients(
            *(lm, trainable, non_trainable, (x, ids[:, 1:], weights)),
            TrainStepOptions(**options),
        )
        return sums.loss / total, grads

    variables = lm.trainable_variables, lm.non_trainable_variables
    return jax.jit(run)(*([v.value for v in group] for group in variables))


@pytest.mark.parametrize(
    "rematerialize",
    [
        "none",
        "products",
        pytest.param("projections", marks=pytest.mark.slow),
        pytest.param("full", marks=pytest.mark.slow),
    ],
)
def test_scan_layers_equals_applying_layers_one_by_one(rematerialize):
    lm, ids = random_lm(THREE_LAYERS), batch(THREE_LAYERS, 2, 13)
    assert lm.backbone.num_layers == 3
    expected_loss, expected = loss_and_gradients(lm, ids)
    loss, grads = loss_and_gradients(lm, ids, scan=True, rematerialize=rematerialize)
    assert float(loss) == pytest.approx(float(expected_loss), rel=1e-6)
    for variable, x, y in zip(lm.trainable_variables, grads, expected, strict=True):
        assert jnp.linalg.norm(x - y) < 1e-5 * jnp.linalg.norm(y), variable.path


def test_scan_layers_stacks_matrices_in_the_dtype_of_the_states():
    layers = [keras.layers.Dense(4, dtype="mixed_bfloat16") for _ in range(3)]
    for layer in layers:
        layer.build((None, 4))
    x = jnp.ones((2, 4), "bfloat16")
    apply_layer = functional_call(layers[0], layers[0])
    program = str(jax.make_jaxpr(lambda x: scan_layers(layers, apply_layer, x))(x))
    # Kernels, not biases: norms, which are vectors, are used in float32.
    assert "bf16[3,4,4]" in program and "f32[3,4]" in program
    assert "f32[3,4,4]" not in program.replace("bf16[3,4,4]", "")
    expected = x
    for layer in layers:
        expected = layer(expected)
    np.testing.assert_array_equal(
        scan_layers(layers, apply_layer, x).astype("float32"),
        expected.astype("float32"),
    )


@pytest.mark.parametrize(("num_layers", "expected_steps"), [(4, 2), (3, 3)])
def test_scan_layers_applies_layers_per_step_in_order(num_layers, expected_steps):
    layers = [keras.layers.Dense(4, "tanh") for _ in range(num_layers)]
    expected = x = jnp.linspace(-1, 1, 8).reshape((2, 4))
    for layer in layers:
        layer.build((None, 4))
        expected = layer(expected)

    def scan(x):
        return scan_layers(layers, functional_call(layers[0], layers[0]), x, 2)

    assert f"length={expected_steps}" in str(jax.make_jaxpr(scan)(x))
    np.testing.assert_allclose(scan(x), expected, rtol=1e-6)
