"""Mixed bfloat16 trains as float32 does, and so do the switches of memory; on JAX."""

import keras
import numpy as np
import pytest
import real_text

if keras.config.backend() != "jax":
    pytest.skip("The step is JAX's.", allow_module_level=True)

import jax
from tiny_models import TinyShape, random_lm

from keras_openllama import OpenLlamaCausalLM, OpenLlamaTokenizer
from keras_openllama.optimizers import AdamW
from keras_openllama.training.train_step_jax import (
    TrainStepOptions,
    compute_gradients,
    train_step,
)

LENGTH = 256
ROWS = 16
SWITCHES = {
    "as on TPUs": {"rematerialize": "products", "scan": True, "micro_batches": 4},
    "all again": {"rematerialize": "full"},
}


@pytest.fixture(scope="module")
def tokens():
    tokenizer = OpenLlamaTokenizer.from_preset("open_llama_nano")
    return np.array(tokenizer("\n".join(real_text.prose())), "int32")


def rows_of(tokens, rows, length, start=0):
    """A batch as `train_step_jax.loss_sums` takes it."""
    ids = tokens[start : start + rows * (length + 1)].reshape(rows, length + 1)
    x = {"token_ids": ids[:, :-1], "padding_mask": np.ones((rows, length), "int32")}
    return x, ids[:, 1:], np.ones((rows, length), "float32")


def values(variables):
    return [v.value for v in variables]


@pytest.fixture(scope="module")
def of_nano(tokens):
    """A function of a precision and options: nano's loss and gradients."""
    batch = rows_of(tokens, ROWS, LENGTH)

    def compute(dtype, **options):
        lm = OpenLlamaCausalLM.from_preset("open_llama_nano", dtype=dtype)
        sums, total, grads = jax.jit(
            lambda *state: compute_gradients(
                lm, *state, batch, TrainStepOptions(**options)
            )
        )(values(lm.trainable_variables), values(lm.non_trainable_variables))
        grads = [np.asarray(g, "float32") for g in grads]
        paths = [v.path for v in lm.trainable_variables]
        return float(sums.loss / total), dict(zip(paths, grads, strict=True))

    return compute


@pytest.fixture(scope="module")
def in_bfloat16(of_nano):
    return of_nano("mixed_bfloat16")


def error(gradients, expected):
    """The norm of the difference, by the norm of what is expected."""
    difference = sum(
        np.sum((a - b) ** 2) for a, b in zip(gradients, expected, strict=True)
    )
    return (difference / sum(np.sum(b**2) for b in expected)) ** 0.5


def test_the_gradient_is_within_a_percent_of_float32(of_nano, in_bfloat16):
    loss, grads = in_bfloat16
    expected_loss, expected = of_nano("float32")
    assert loss == pytest.approx(expected_loss, rel=1e-3)
    assert error(grads.values(), expected.values()) < 0.01
    for path, gradient in expected.items():
        # Weights are rounded, which alone is 1 % in some.
        assert error([grads[path]], [gradient]) < 0.015, path
        norm = np.linalg.norm(grads[path])
        assert norm == pytest.approx(np.linalg.norm(gradient), rel=0.01), path


@pytest.mark.slow
@pytest.mark.parametrize("switches", SWITCHES)
def test_switches_keep_each_gradient_within_a_percent(of_nano, in_bfloat16, switches):
    loss, grads = of_nano("mixed_bfloat16", **SWITCHES[switches])
    expected_loss, expected = in_bfloat16
    assert loss == pytest.approx(expected_loss, rel=1e-3)
    for path, gradient in expected.items():
        assert error([grads[path]], [gradient]) < 0.01, path


SMALL = TinyShape("small", 4, 2, 100, vocabulary_size=8192)
STEPS = 200


def losses(tokens, dtype, **options):
    """Those of 200 steps of a small model on real text."""
    rows, length = 8, 64
    keras.utils.set_random_seed(0)
    lm = random_lm(SMALL, dtype=dtype)
    lm.compile(optimizer=AdamW(2e-3))
    lm.optimizer.build(lm.trainable_variables)

    @jax.jit
    def step(trainable, optimizer, batch):
        state = trainable, values(lm.non_trainable_variables), optimizer
        return train_step(lm, state, batch, TrainStepOptions(**options))

    state = values(lm.trainable_variables), values(lm.optimizer.variables)
    found = []
    for number in range(STEPS):
        start = number * rows * (length + 1) % (len(tokens) - rows * (length + 1))
        measures, state = step(*state, rows_of(tokens, rows, length, start))
        found.append(float(measures.loss))
    return np.array(found)


@pytest.mark.slow
def test_the_loss_of_200_steps_is_within_a_percent(tokens):
    expected = losses(tokens, "float32")
    options = {"rematerialize": "products", "scan": True, "micro_batches": 2}
    found = losses(tokens, "mixed_bfloat16", **options)
    assert expected[-20:].mean() < 0.8 * expected[0]  # Something was learnt.
    np.testing.assert_allclose(found, expected, rtol=0.01)
