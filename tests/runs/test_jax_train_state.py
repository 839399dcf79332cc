"""JaxTrainState: steps, evaluation, generation and checkpoints."""

import jax
import numpy as np
import pytest
from small_config import small_config
from tiny_models import TinyShape, batch, random_lm
from tokenizer_models import trained_model

from keras_openllama.runs.checkpoint_manager import CheckpointManager
from keras_openllama.runs.jax_train_state import JaxTrainState
from keras_openllama.runs.optimizer import compile_model

pytestmark = [
    pytest.mark.backend_free,  # It is JAX, whatever Keras runs on.
    pytest.mark.usefixtures("compile_fast"),
]

SHAPE = TinyShape("small", 4, 2, 8, hidden_dim=32, num_layers=1)
ROWS, LENGTH = 2, 12
CONFIG = small_config(sequence_length=LENGTH, batch_size=ROWS)


def state_of(rank=None):
    """A state with a compiled step, and a batch."""
    lm = random_lm(SHAPE, trained_model(keep_spaces=True))
    if rank:
        lm.backbone.enable_lora(rank)
    compile_model(lm, CONFIG)
    state = JaxTrainState(lm, CONFIG, save_frozen=rank is None)
    ids = batch(SHAPE, ROWS, LENGTH + 1)
    x = {"token_ids": ids[:, :-1], "padding_mask": np.ones((ROWS, LENGTH), "int32")}
    put = state.put_batch((x, ids[:, 1:], np.ones((ROWS, LENGTH), "float32")))
    state.compile(put, evaluation=True)
    return state, put


def values(lm):
    return {v.path: np.array(v.value) for v in lm.variables}


def copied(arrays):
    return jax.tree.map(np.array, arrays)


def test_train_step_lowers_the_loss_and_evaluate_batch_changes_nothing():
    state, data = state_of()
    losses = [float(state.train_step(data).loss) for _ in range(3)]
    assert losses[2] < losses[1] < losses[0]
    before = copied(state.arrays())
    sums, weight = state.evaluate_batch(data)
    assert weight == ROWS * LENGTH
    jax.tree.map(np.testing.assert_array_equal, copied(state.arrays()), before)
    assert sums.loss / weight == pytest.approx(
        float(state.train_step(data).loss), rel=1e-5
    )


def test_update_model_assigns_the_trained_values():
    state, data = state_of()
    before = values(state.lm)
    state.train_step(data)
    state.update_model()
    arrays = state.arrays()["model"]
    after = values(state.lm)
    assert any((before[path] != after[path]).any() for path in arrays)
    for path, array in arrays.items():
        np.testing.assert_array_equal(after[path], array)


def test_generate_uses_the_current_weights():
    state, data = state_of()
    before = state.generate(["The"], max_new_tokens=4)
    for _ in range(30):
        state.train_step(data)
    found = state.generate(["The"], max_new_tokens=4)
    state.update_model()
    assert found == state.lm.generate(["The"], max_new_tokens=4) != before


@pytest.mark.parametrize("rank", [None, 2])
def test_restore_resumes_bit_exactly(rank, tmp_path):
    state, data = state_of(rank)
    state.train_step(data)
    checkpoints = CheckpointManager(tmp_path)
    checkpoints.save(1, state.arrays(), {"note": "mine"})
    checkpoints.wait()
    expected = copied(state.train_step(data))
    again, data = state_of(rank)
    assert again.restore(checkpoints)["step"] == 1
    checkpoints.close()
    assert copied(again.train_step(data)) == expected


def test_restore_returns_none_without_checkpoints(tmp_path):
    state, _ = state_of()
    before = copied(state.arrays())
    assert state.restore(CheckpointManager(tmp_path)) is None
    jax.tree.map(np.testing.assert_array_equal, copied(state.arrays()), before)


def test_arrays_omit_frozen_weights_if_save_frozen_is_false():
    state, _ = state_of(rank=2)
    trainable = {v.path for v in state.lm.trainable_variables}
    assert {*state.arrays()["model"]} == trainable
    assert all("lora" in path for path in trainable)
