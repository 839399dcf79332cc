"""What importing the package does, in a process of its own."""

import os
import subprocess
import sys

import pytest

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
