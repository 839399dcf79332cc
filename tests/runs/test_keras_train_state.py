"""KerasTrainState: steps, evaluation and checkpoints with Keras's train step."""

import numpy as np
import pytest
from small_config import small_config
from tiny_models import TinyShape, batch, random_lm

from keras_openllama.runs.checkpoint_manager import CheckpointManager
from keras_openllama.runs.keras_train_state import KerasTrainState
from keras_openllama.runs.optimizer import make_optimizer

pytestmark = pytest.mark.usefixtures("compile_fast")

SHAPE = TinyShape("small", 4, 2, 8, hidden_dim=32, num_layers=1)
ROWS, LENGTH = 2, 12
CONFIG = small_config(sequence_length=LENGTH, batch_size=ROWS)


def state_of(rank=None):
    lm = random_lm(SHAPE)
    if rank:
        lm.backbone.enable_lora(rank)
    # Keras computes the accuracy; the train step for JAX computes it itself.
    lm.compile(optimizer=make_optimizer(CONFIG))
    lm.optimizer.build(lm.trainable_variables)
    return KerasTrainState(lm, save_frozen=rank is None)


def changed(one, other):
    """Paths of the arrays that differ."""
    return [path for path in one if (one[path] != other[path]).any()]


@pytest.fixture
def data():
    ids = batch(SHAPE, ROWS, LENGTH + 1)
    x = {"token_ids": ids[:, :-1], "padding_mask": np.ones((ROWS, LENGTH), "int32")}
    weights = np.ones((ROWS, LENGTH), "float32")
    weights[1, 6:] = 0
    return x, ids[:, 1:], weights


def test_train_step_returns_its_metrics(data):
    state = state_of()
    rate = float(state.lm.optimizer.learning_rate)
    first, second = state.train_step(data), state.train_step(data)
    assert second.loss < first.loss
    assert first.targets == data[2].sum() and first.applied
    assert second.learning_rate < first.learning_rate == np.float32(rate)
    assert first.grad_norm is None and first.param_norm is None


def test_train_step_skips_a_loss_that_is_not_finite(data):
    x, targets, weights = data
    weights[0, 3] = np.inf
    state = state_of()
    before = state.arrays()
    metrics = state.train_step((x, targets, weights))
    assert not metrics.applied
    assert not changed(state.arrays()["model"], before["model"])


def test_a_batch_without_targets_is_skipped_and_adds_nothing(data):
    x, targets, weights = data
    state = state_of()
    state.train_step(data)  # Momentum would move the weights.
    before = state.arrays()
    metrics = state.train_step((x, targets, 0 * weights))
    assert np.isnan(metrics.loss) and not metrics.applied
    for part, arrays in before.items():
        assert not changed(state.arrays()[part], arrays)
    assert state.evaluate_batch((x, targets, 0 * weights)) == ((0, 0, 0), 0)


def test_evaluate_batch_sums_over_targets(data):
    state = state_of()
    before = state.arrays()["model"]
    sums, targets = state.evaluate_batch(data)
    assert targets == data[2].sum()
    assert not changed(state.arrays()["model"], before)
    assert sums.loss / targets == pytest.approx(state.train_step(data).loss, rel=1e-5)


def test_arrays_are_copies_that_later_steps_do_not_change(data):
    state = state_of()
    arrays = state.arrays()
    before = {path: array.copy() for path, array in arrays["model"].items()}
    state.train_step(data)
    assert not changed(arrays["model"], before)
    assert changed(state.arrays()["model"], before)


@pytest.mark.parametrize("rank", [None, 2])
def test_restore_resumes_bit_exactly(rank, data, tmp_path):
    state = state_of(rank)
    state.train_step(data)
    checkpoints = CheckpointManager(tmp_path)
    checkpoints.save(1, state.arrays(), {})
    checkpoints.wait()
    expected = state.train_step(data)
    again = state_of(rank)
    assert again.restore(checkpoints)["step"] == 1
    checkpoints.close()
    assert again.train_step(data) == expected


def test_restore_returns_none_without_checkpoints(tmp_path):
    assert state_of().restore(CheckpointManager(tmp_path)) is None


def test_arrays_omit_frozen_weights_if_save_frozen_is_false():
    state = state_of(rank=2)
    trainable = {v.path for v in state.lm.trainable_variables}
    assert {*state.arrays()["model"]} == trainable
