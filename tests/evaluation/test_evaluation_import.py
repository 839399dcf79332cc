"""Importing `keras_openllama.evaluation`, with the extra `eval` and without."""

import subprocess
import sys

import pytest

pytestmark = pytest.mark.backend_free


def printed(code):
    return subprocess.check_output([sys.executable, "-c", code], text=True).strip()


def test_perplexity_is_imported_without_the_harness():
    code = (
        "import sys\n"
        "class Hidden:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name.split('.')[0] == 'lm_eval':\n"
        "            raise ModuleNotFoundError(f'No module named {name}', name=name)\n"
        "sys.meta_path.insert(0, Hidden())\n"
        "from keras_openllama.evaluation import perplexity\n"
        "print(callable(perplexity.evaluate))"
    )
    assert printed(code) == "True"


def test_importing_evaluation_registers_the_model():
    code = (
        "import keras_openllama.evaluation\n"
        "from lm_eval.api.registry import get_model\n"
        "print(get_model('keras_openllama').__name__)"
    )
    assert printed(code) == "OpenLlamaLM"
