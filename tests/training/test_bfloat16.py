"""Training in mixed bfloat16 and with memory options agrees with float32, on JAX."""

import keras
import numpy as np
import pytest
import real_text

if keras.config.backend() != "jax":
    pytest.skip("Needs JAX.", allow_module_level=True)

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
BATCH_SIZE = 16
MEMORY_OPTIONS = {
    "TPU defaults": {"rematerialize": "products", "scan": True, "micro_batches": 4},
    "full rematerialization": {"rematerialize": "full"},
}


@pytest.fixture(scope="module")
def tokens():
    tokenizer = OpenLlamaTokenizer.from_preset("open_llama_nano")
    return np.array(tokenizer("\n".join(real_text.prose())), "int32")


def make_batch(tokens, batch_size, length, start=0):
    """A batch as `train_step_jax.loss_sums` takes it."""
    ids = tokens[start : start + batch_size * (length + 1)]
    ids = ids.reshape(batch_size, length + 1)
    x = {
        "token_ids": ids[:, :-1],
        "padding_mask": np.ones((batch_size, length), "int32"),
    }
    return x, ids[:, 1:], np.ones((batch_size, length), "float32")


def values(variables):
    return [v.value for v in variables]


@pytest.fixture(scope="module")
def of_nano(tokens):
    """A function from dtype and options to the loss and gradients of nano."""
    batch = make_batch(tokens, BATCH_SIZE, LENGTH)

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
def in_float32(of_nano):
    return of_nano("float32")


def error(gradients, expected):
    """Norm of the difference, relative to the expected norm."""
    difference = sum(
        np.sum((a - b) ** 2) for a, b in zip(gradients, expected, strict=True)
    )
    return (difference / sum(np.sum(b**2) for b in expected)) ** 0.5


def assert_within_one_percent(found, expected):
    """Compares losses and gradients in bfloat16 with those in float32."""
    loss, grads = found
    expected_loss, expected = expected
    assert loss == pytest.approx(expected_loss, rel=1e-3)
    assert error(grads.values(), expected.values()) < 0.01
    for path, gradient in expected.items():
        # The rounding of the weights alone is 1 % in some.
        assert error([grads[path]], [gradient]) < 0.015, path
        norm = np.linalg.norm(grads[path])
        assert norm == pytest.approx(np.linalg.norm(gradient), rel=0.01), path


def test_mixed_bfloat16_gradients_are_within_one_percent_of_float32(
    of_nano, in_float32
):
    assert_within_one_percent(of_nano("mixed_bfloat16"), in_float32)


@pytest.mark.slow
@pytest.mark.parametrize("options", MEMORY_OPTIONS)
def test_memory_options_keep_gradients_within_one_percent_of_float32(
    of_nano, in_float32, options
):
    # Two roundings to bfloat16 differ by as much from each other as from float32.
    found = of_nano("mixed_bfloat16", **MEMORY_OPTIONS[options])
    assert_within_one_percent(found, in_float32)
    loss, grads = of_nano("float32", **MEMORY_OPTIONS[options])
    assert loss == pytest.approx(in_float32[0], rel=1e-6)
    for path, gradient in in_float32[1].items():
        assert error([grads[path]], [gradient]) < 1e-5, path


SMALL = TinyShape("small", 4, 2, 100, vocabulary_size=8192)
STEPS = 200


def losses(tokens, dtype, **options):
    """The losses of 200 steps of a small model on real text."""
    batch_size, length = 8, 64
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
        start = number * batch_size * (length + 1)
        start %= len(tokens) - batch_size * (length + 1)
        metrics, state = step(*state, make_batch(tokens, batch_size, length, start))
        found.append(float(metrics.loss))
    return np.array(found)


@pytest.mark.slow
def test_mixed_bfloat16_loss_of_200_steps_is_within_one_percent(tokens):
    expected = losses(tokens, "float32")
    options = {"rematerialize": "products", "scan": True, "micro_batches": 2}
    found = losses(tokens, "mixed_bfloat16", **options)
    assert expected[-20:].mean() < 0.8 * expected[0]  # The model has learned.
    np.testing.assert_allclose(found, expected, rtol=0.01)
