"""What importing the package does, tested in separate processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import keras_openllama
from keras_openllama.__main__ import COMMANDS

pytestmark = pytest.mark.backend_free


def run_python(code, **environment):
    """Runs code in a new process and returns what it prints."""
    inherited = {k: v for k, v in os.environ.items() if k != "KERAS_BACKEND"}
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**inherited, **environment},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()


SHOW = "print(keras.config.backend())"


def test_jax_is_the_default_backend():
    assert run_python(f"import keras_openllama, keras; {SHOW}") == "jax"


def test_import_does_not_override_the_chosen_backend():
    code = f"import keras_openllama, keras; {SHOW}"
    assert run_python(code, KERAS_BACKEND="torch") == "torch"


def test_import_does_not_import_keras():
    code = "import sys, keras_openllama; print('keras' in sys.modules)"
    assert run_python(code) == "False"


def test_import_does_not_import_tensorflow_which_stays_importable():
    code = (
        "import sys; from keras_openllama import OpenLlamaCausalLM;"
        "print('tensorflow' in sys.modules);"
        "import tensorflow; print(tensorflow.constant(3).numpy())"
    )
    assert run_python(code, TF_CPP_MIN_LOG_LEVEL="3").splitlines() == ["False", "3"]


def test_public_names_are_listed_and_exist():
    code = (
        "import keras_openllama as package;"
        "missing = [n for n in package.__all__ if not hasattr(package, n)];"
        "print(missing, set(package.__all__) == set(dir(package)))"
    )
    assert run_python(code) == "[] True"


def test_public_modules_are_attributes_of_the_package():
    code = (
        "import keras_openllama;"
        "print(keras_openllama.presets.find('7b_v2').name,"
        " keras_openllama.convert.easylm.load.__name__)"
    )
    assert run_python(code) == "open_llama_7b_v2 load"


def test_package_root_contains_public_modules_only():
    root = Path(keras_openllama.__file__).parent
    assert {path.stem for path in root.glob("*.py")} == {
        *("__init__", "__main__", "config", "distribution", "optimizers", "presets")
    }


def test_help_of_every_command_needs_no_dependency():
    code = (
        "import contextlib, sys; from keras_openllama.__main__ import COMMANDS, main\n"
        "for command in COMMANDS:\n"
        "    with contextlib.suppress(SystemExit): main([command, '--help'])"
    )
    # -S: without the installed packages.
    help = subprocess.run(
        [sys.executable, "-S", "-c", code],
        env={
            **os.environ,
            "PYTHONPATH": str(Path(keras_openllama.__file__).parents[1]),
        },
        capture_output=True,
        text=True,
    )
    assert help.returncode == 0, help.stderr
    for command in COMMANDS:
        assert f"usage: keras-openllama {command} " in help.stdout
