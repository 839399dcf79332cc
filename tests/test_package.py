"""What importing the package does, in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import keras_openllama
from keras_openllama.__main__ import COMMANDS

pytestmark = pytest.mark.backend_free


def run(code, **environment):
    """What a fresh process prints."""
    kept = {k: v for k, v in os.environ.items() if k != "KERAS_BACKEND"}
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**kept, **environment},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()


SHOW = "print(keras.config.backend())"


def test_jax_is_the_default_backend():
    assert run(f"import keras_openllama, keras; {SHOW}") == "jax"


def test_the_backend_that_was_chosen_stays():
    code = f"import keras_openllama, keras; {SHOW}"
    assert run(code, KERAS_BACKEND="torch") == "torch"


def test_importing_the_package_imports_no_keras():
    code = "import sys, keras_openllama; print('keras' in sys.modules)"
    assert run(code) == "False"


def test_tensorflow_is_spared_and_still_there():
    code = (
        "import sys; from keras_openllama import OpenLlamaCausalLM;"
        "print('tensorflow' in sys.modules);"
        "import tensorflow; print(tensorflow.constant(3).numpy())"
    )
    assert run(code, TF_CPP_MIN_LOG_LEVEL="3").splitlines() == ["False", "3"]


def test_the_public_names_are_listed_and_there():
    code = (
        "import keras_openllama as package;"
        "missing = [n for n in package.__all__ if not hasattr(package, n)];"
        "print(missing, set(package.__all__) == set(dir(package)))"
    )
    assert run(code) == "[] True"


def test_namespaces_need_no_import_of_their_own():
    code = (
        "import keras_openllama;"
        "print(keras_openllama.presets.find('7b_v2').name,"
        " keras_openllama.convert.easylm.load.__name__)"
    )
    assert run(code) == "open_llama_7b_v2 load"


def test_the_root_holds_the_public_surface_only():
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
