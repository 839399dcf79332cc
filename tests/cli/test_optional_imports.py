"""A command does not wait for packages that only Keras would import."""

import os
import subprocess
import sys

import pytest
from checkout import ROOT

pytestmark = pytest.mark.backend_free

UNUSED = {"grain", "matplotlib", "pandas", "rouge_score", "sklearn"}
# Python imports it whenever it starts.
RECORD_MODULES = """
import atexit, os, sys
path = os.path.join(os.path.dirname(__file__), "modules")
atexit.register(lambda: open(path, "w").write(" ".join(sys.modules)))
"""


def modules_of(directory, *words):
    """Runs Python; returns the names of the modules that it has imported."""
    (directory / "sitecustomize.py").write_text(RECORD_MODULES)
    subprocess.run(
        [sys.executable, *words],
        env={**os.environ, "PYTHONPATH": f"{directory}{os.pathsep}{ROOT}"},
        check=True,
    )
    return set((directory / "modules").read_text().split())


def test_generate_imports_keras_without_what_keras_does_not_need(tmp_path):
    words = ("generate", "The", "--preset", "nano", "--max-new-tokens", "1")
    modules = modules_of(tmp_path, "-m", "keras_openllama", *words)
    assert {"keras", "keras_hub"} < modules
    assert not modules & UNUSED


def test_hide_from_keras_leaves_them_to_every_other_import(tmp_path):
    program = (
        "from keras_openllama.cli.optional_imports import hide_from_keras\n"
        "hide_from_keras()\n"
        "from keras_openllama.backend import keras_hub\n"
        "import grain, matplotlib, pandas, rouge_score, sklearn"
    )
    assert modules_of(tmp_path, "-c", program) >= {"keras", *UNUSED}
