"""Answers outlive their process, and are those of one model."""

import os
import signal
import subprocess
import sys

import pytest

from keras_openllama import OpenLlamaCausalLM
from keras_openllama.evaluation.response_cache import Answers, fingerprint, key_of

pytestmark = pytest.mark.backend_free

KILLED = """
import os, signal, sys
from keras_openllama.evaluation.response_cache import Answers
answers = Answers(sys.argv[1], {"model": "a"})
answers.add({"one": 0.1, "two": [-1.5, True]})
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_answers_outlive_a_kill_to_the_bit(tmp_path):
    path = tmp_path / "new" / "answers.sqlite"
    killed = subprocess.run([sys.executable, "-c", KILLED, path], env={**os.environ})
    assert killed.returncode == -signal.SIGKILL
    answers = Answers(path, {"model": "a"})
    assert answers.get("one") == 0.1
    assert answers.get("two") == [-1.5, True]
    assert "three" not in answers


def test_answers_of_another_model_are_refused(tmp_path):
    path = tmp_path / "answers.sqlite"
    Answers(path, {"model": "a"}).add({"one": 1})
    with pytest.raises(ValueError, match="another model") as refused:
        Answers(path, {"model": "b"})
    assert str(path) in str(refused.value)


def test_a_file_of_something_else_is_named(tmp_path):
    path = tmp_path / "answers.sqlite"
    path.write_text("These are no answers, but a text of some length." * 30)
    with pytest.raises(ValueError, match=r"answers\.sqlite is no file of answers"):
        Answers(path, {})


def test_a_path_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(OSError, match="cannot be used"):
        Answers(tmp_path, {})


def test_without_a_file_answers_are_kept_in_memory():
    answers = Answers(None, {})
    answers.add({"one": 1})
    assert "one" in answers


def test_requests_have_one_key_each():
    assert key_of("a", [1, 2]) == key_of("a", (1, 2))
    assert len({key_of("a", [1, 2]), key_of("a", [12]), key_of("b", [1, 2])}) == 3


def test_other_weights_have_another_fingerprint():
    lm = OpenLlamaCausalLM.from_preset("open_llama_nano")
    before = fingerprint(lm)
    assert before == fingerprint(OpenLlamaCausalLM.from_preset("open_llama_nano"))
    lm.backbone.enable_lora(2)
    assert fingerprint(lm) != before
    kernel = lm.backbone.transformer_layers[1].feedforward.down.kernel
    kernel.assign(kernel * 1.001)
    assert fingerprint(lm) != before
