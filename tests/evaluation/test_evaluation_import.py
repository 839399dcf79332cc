"""Importing `keras_openllama.evaluation`, with and without the extra `eval`."""

import subprocess
import sys

import pytest

pytestmark = pytest.mark.backend_free


def output_of(code):
    return subprocess.check_output([sys.executable, "-c", code], text=True).strip()


def test_perplexity_can_be_imported_without_the_harness():
    code = (
        "import sys\n"
        "class Hidden:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name.split('.')[0] == 'lm_eval':\n"
        "            raise ModuleNotFoundError(f'No module named {name}', name=name)\n"
        "sys.meta_path.insert(0, Hidden())\n"
        "from keras_openllama.evaluation import perplexity\n"
        "print(callable(perplexity.evaluate_perplexity))"
    )
    assert output_of(code) == "True"


def test_importing_evaluation_registers_the_model():
    code = (
        "import keras_openllama.evaluation\n"
        "from lm_eval.api.registry import get_model\n"
        "print(get_model('keras_openllama').__name__)"
    )
    assert output_of(code) == "OpenLlamaLM"
