"""TrainConfig validates each setting and combinations of settings."""

import dataclasses
import subprocess
import sys

import pytest
from small_config import SETTINGS, small_config

pytestmark = pytest.mark.backend_free


def test_train_config_stores_valid_settings_unchanged():
    values = dataclasses.asdict(small_config())
    assert values.items() >= SETTINGS.items()


def test_tokens_per_step_is_batch_size_times_sequence_length():
    assert small_config().tokens_per_step == 4 * 32


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", 0),
        ("batch_size", 4.5),
        ("learning_rate", -1e-3),
        ("beta_2", 1.5),
        ("weight_decay", -0.1),
        ("optimizer", "sgd"),
        ("rematerialize", "some"),
        ("warmup_steps", -1),
        ("seed", "7"),
    ],
)
def test_train_config_names_an_invalid_setting(name, value):
    with pytest.raises(ValueError, match=f"`{name}`.*{value}"):
        small_config(**{name: value})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"final_learning_rate": 2e-2}, "`final_learning_rate` must not exceed"),
        ({"warmup_steps": 10}, "`warmup_steps` must be less than `steps`"),
        ({"micro_batches": 3}, "`micro_batches` must divide `batch_size`"),
    ],
)
def test_train_config_rejects_conflicting_settings(changes, message):
    with pytest.raises(ValueError, match=message):
        small_config(**changes)


def test_importing_train_config_imports_no_backend():
    script = (
        "import sys, keras_openllama.runs.train_config\n"
        "print({'keras', 'jax', 'tensorflow', 'torch'} & {*sys.modules})"
    )
    command = [sys.executable, "-c", script]
    assert subprocess.check_output(command, text=True) == "set()\n"
