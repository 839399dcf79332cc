"""The settings of training are checked one by one and together."""

import dataclasses
import subprocess
import sys

import pytest
from small_config import SETTINGS, small_config

pytestmark = pytest.mark.backend_free


def test_settings_come_back_as_they_were_given():
    values = dataclasses.asdict(small_config())
    assert values.items() >= SETTINGS.items()


def test_a_step_has_the_tokens_of_all_its_sequences():
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
def test_a_setting_that_is_not_allowed_is_named(name, value):
    with pytest.raises(ValueError, match=f"`{name}`.*{value}"):
        small_config(**{name: value})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"final_learning_rate": 2e-2}, "`final_learning_rate` must not be above"),
        ({"warmup_steps": 10}, "`warmup_steps` must be below `steps`"),
        ({"micro_batches": 3}, "`micro_batches` must divide `batch_size`"),
    ],
)
def test_settings_that_do_not_fit_each_other_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        small_config(**changes)


def test_it_is_imported_without_keras_and_without_a_backend():
    script = (
        "import sys, keras_openllama.runs.train_config\n"
        "print({'keras', 'jax', 'tensorflow', 'torch'} & {*sys.modules})"
    )
    asked = [sys.executable, "-c", script]
    assert subprocess.check_output(asked, text=True) == "set()\n"
