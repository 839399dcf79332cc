"""Responses outlive their process, and belong to one model."""

import os
import signal
import subprocess
import sys

import pytest

from keras_openllama import OpenLlamaCausalLM
from keras_openllama.evaluation.response_cache import (
    ResponseCache,
    request_key,
    weights_fingerprint,
)

pytestmark = pytest.mark.backend_free

KILLED = """
import os, signal, sys
from keras_openllama.evaluation.response_cache import ResponseCache
cache = ResponseCache(sys.argv[1], {"model": "a"})
cache.add({"one": 0.1, "two": [-1.5, True]})
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_response_cache_survives_sigkill_bit_exactly(tmp_path):
    path = tmp_path / "new" / "responses.sqlite"
    killed = subprocess.run([sys.executable, "-c", KILLED, path], env={**os.environ})
    assert killed.returncode == -signal.SIGKILL
    cache = ResponseCache(path, {"model": "a"})
    assert cache.get("one") == 0.1
    assert cache.get("two") == [-1.5, True]
    assert "three" not in cache


def test_response_cache_rejects_responses_of_another_model(tmp_path):
    path = tmp_path / "responses.sqlite"
    ResponseCache(path, {"model": "a"}).add({"one": 1})
    with pytest.raises(ValueError, match="another model") as error:
        ResponseCache(path, {"model": "b"})
    assert str(path) in str(error.value)


def test_response_cache_names_a_file_that_is_not_a_cache(tmp_path):
    path = tmp_path / "responses.sqlite"
    path.write_text("This is not a cache, but a text of some length." * 30)
    with pytest.raises(ValueError, match=r"responses\.sqlite is not a response cache"):
        ResponseCache(path, {})


def test_response_cache_names_a_path_that_cannot_be_opened(tmp_path):
    with pytest.raises(OSError, match="cannot be opened"):
        ResponseCache(tmp_path, {})


def test_response_cache_without_a_file_is_in_memory():
    cache = ResponseCache(None, {})
    cache.add({"one": 1})
    assert "one" in cache


def test_request_key_is_unique():
    assert request_key("a", [1, 2]) == request_key("a", (1, 2))
    assert (
        len(
            {request_key("a", [1, 2]), request_key("a", [12]), request_key("b", [1, 2])}
        )
        == 3
    )


def test_weights_fingerprint_depends_on_weights_and_adapters():
    lm = OpenLlamaCausalLM.from_preset("open_llama_nano")
    before = weights_fingerprint(lm)
    assert before == weights_fingerprint(
        OpenLlamaCausalLM.from_preset("open_llama_nano")
    )
    lm.backbone.enable_lora(2)
    assert weights_fingerprint(lm) != before
    kernel = lm.backbone.transformer_layers[1].feedforward.down.kernel
    kernel.assign(kernel * 1.001)
    assert weights_fingerprint(lm) != before
