"""Quantized weights are moved to a file for generation, and can still be changed."""

import os
import signal
import subprocess
import sys

import keras
import numpy as np
import pytest
import tiny_models
from checkout import ROOT
from mapped_memory import files_of, needs_mapped_weights

from keras_openllama.backend.arrays import as_numpy
from keras_openllama.backend.keras_private import flatten_layers
from keras_openllama.generation.onnx_runtime import decoder as onnx_decoder
from keras_openllama.layers.quantizable import is_quantized

SHAPE = tiny_models.SHAPES[0]
PROMPT = [[1, 5, 9, 7]]
ON_TENSORFLOW = keras.config.backend() == "tensorflow"


@pytest.fixture(autouse=True)
def temporary_directory(monkeypatch, tmp_path):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    return tmp_path


def quantized(mode="int4"):
    lm = tiny_models.random_lm(SHAPE)
    lm.quantize(mode)
    lm.compile(sampler="greedy")
    return lm


def generate(lm):
    (new,) = lm.make_generate_function().generate(PROMPT, [8], [])
    return new


def quantized_variables(lm):
    layers = [layer for layer in flatten_layers(lm) if is_quantized(layer)]
    return [v for layer in layers for v in layer.quantized_variables()]


@needs_mapped_weights
@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_generate_moves_quantized_weights_to_a_file(mode, temporary_directory):
    lm = quantized(mode)
    variables, values = quantized_variables(lm), lm.get_weights()
    directory = str(temporary_directory)
    assert not any((path or "").startswith(directory) for path in files_of(variables))
    generate(lm)
    for path in files_of(variables):
        assert path.startswith(directory)
        assert "(deleted)" in path
    assert not list(temporary_directory.iterdir())
    for old, new in zip(values, lm.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)


def test_generate_follows_set_weights_after_weights_were_moved():
    lm, other = quantized(), quantized()
    before = generate(lm)
    values = [np.roll(value, 1, axis=0) for value in lm.get_weights()]
    for model in (lm, other):
        model.set_weights(values)
    assert generate(lm) == generate(other) != before
    for expected, found in zip(values, lm.get_weights(), strict=True):
        np.testing.assert_array_equal(expected, found)


def test_generate_does_not_make_the_decoder_again_after_weights_were_moved():
    loop = quantized().make_generate_function()
    assert loop.decoder() is loop.decoder()


def test_fit_trains_adapters_on_weights_that_were_moved():
    lm = quantized()
    lm.backbone.enable_lora(2)
    before = generate(lm)
    weights = [as_numpy(v.value).copy() for v in quantized_variables(lm)]
    lm.compile(
        optimizer=keras.optimizers.Adam(0.3),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        sampler="greedy",
    )
    ids = tiny_models.batch(SHAPE, 4, 8)
    x = {"token_ids": ids, "padding_mask": np.ones_like(ids)}
    keras.Model.fit(lm, x, np.roll(ids, -1, axis=1), epochs=2, verbose=0)
    for old, variable in zip(weights, quantized_variables(lm), strict=True):
        np.testing.assert_array_equal(old, as_numpy(variable.value))
    assert generate(lm) != before


# Generates as above, and is killed when the files are written.
KILLED = """
import os, signal, sys
import pathlib
from keras_openllama import OpenLlamaCausalLM
from keras_openllama.generation.onnx_runtime import decoder

def killed(*arguments):
    assert pathlib.Path(arguments[0]).is_file()
    os.kill(os.getpid(), signal.SIGKILL)

decoder.open_session = killed
lm = OpenLlamaCausalLM.from_preset("open_llama_nano", quantization="int4")
lm.generate("The", max_new_tokens=1)
"""


@pytest.mark.backend_free
@pytest.mark.skipif(sys.platform == "win32", reason="Directories have no locks.")
def test_generate_removes_what_a_killed_process_left(temporary_directory):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.run([sys.executable, "-c", KILLED], env=environment)
    assert process.returncode == -signal.SIGKILL
    # ONNX Runtime writes files of its own to the directory.
    assert list(temporary_directory.rglob("model.onnx*"))
    generate(quantized())
    assert not list(temporary_directory.glob("*keras_openllama*"))
    assert not list(temporary_directory.rglob("model.onnx*"))


@pytest.mark.skipif(ON_TENSORFLOW, reason="JAX and PyTorch.")
def test_generate_warns_without_space_for_the_file(monkeypatch):
    def no_space(model):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(onnx_decoder, "move_to_disk", no_space)
    with pytest.warns(UserWarning, match="TMPDIR"):
        assert len(generate(quantized())[0]) == 8
