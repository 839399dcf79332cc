"""Messages of Keras and TensorFlow that a user can do nothing about."""

import subprocess
import sys

import keras
import pytest

SCRIPT = """
import sys
from keras_openllama import OpenLlamaCausalLM
lm = OpenLlamaCausalLM.from_preset("open_llama_nano")
lm.quantize("int8")
lm.save_to_preset(sys.argv[1] + "/preset")
lm.save(sys.argv[1] + "/model.keras")
assert "tensorflow" in sys.modules
import warnings
warnings.warn("shown")
"""


@pytest.mark.skipif(
    keras.config.backend() == "tensorflow",
    reason="The program imports TensorFlow itself, with its messages.",
)
def test_quantizing_and_saving_print_no_messages(tmp_path):
    process = [sys.executable, "-c", SCRIPT, str(tmp_path)]
    found = subprocess.run(process, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert found.stderr.splitlines() == ["<string>:10: UserWarning: shown"]
