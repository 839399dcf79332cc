"""Quantized models that version 0.2.0 saved load, with about the same logits."""

import json
import shutil
import warnings
import zipfile
from pathlib import Path

import keras
import numpy as np
import pytest
from keras import ops

from keras_openllama import OpenLlamaCausalLM
from keras_openllama.layers.quantizable import is_quantized

DIRECTORY = Path(__file__).parents[1] / "fixtures" / "quantized_models_0_2"
LOGITS = json.loads((DIRECTORY / "logits.json").read_text())


def error(lm, expected):
    found = ops.convert_to_numpy(lm.score(np.array(LOGITS["ids"])))
    return np.abs(found - expected).max() / np.std(expected)


def load(mode):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        lm = keras.saving.load_model(DIRECTORY / f"{mode}.keras")
    return lm, [str(w.message) for w in caught if "Keras's own" in str(w.message)]


def test_load_model_restores_int8_of_version_0_2():
    lm, messages = load("int8")
    assert not messages
    # Version 0.2.0 rounded activations to int8, too.
    assert error(lm, LOGITS["int8"]) < 0.06
    assert error(lm, LOGITS["float32"]) < error_of(LOGITS["int8"], LOGITS["float32"])


def error_of(found, expected):
    return np.abs(np.subtract(found, expected)).max() / np.std(expected)


def test_load_model_converts_int4_of_version_0_2_to_int8():
    lm, messages = load("int4")
    assert messages and all("converted to int8" in message for message in messages)
    assert error_of(LOGITS["int4"], LOGITS["float32"]) > 0.3
    assert error(lm, LOGITS["int4"]) < 0.05
    assert lm.lm_head.quantized_matrix().group_size == 32


@pytest.mark.slow_on_tensorflow
def test_models_of_version_0_2_are_saved_in_the_new_format(tmp_path):
    for mode in ("int8", "int4"):
        lm, _ = load(mode)
        lm.save(tmp_path / "lm.keras")
        copy = keras.saving.load_model(tmp_path / "lm.keras")
        expected = ops.convert_to_numpy(lm.score(np.array(LOGITS["ids"])))
        assert error(copy, expected) == 0
        assert is_quantized(copy.backbone.token_embedding)


@pytest.mark.slow_on_tensorflow
@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_load_weights_of_version_0_2_into_a_quantized_model(mode, tmp_path):
    with zipfile.ZipFile(DIRECTORY / f"{mode}.keras") as archive:
        with archive.open("model.weights.h5") as source:
            path = tmp_path / "lm.weights.h5"
            with open(path, "wb") as target:
                shutil.copyfileobj(source, target)
    config = load("int8")[0].backbone.architecture()
    backbone_cls = OpenLlamaCausalLM.backbone_cls
    lm = OpenLlamaCausalLM(backbone_cls(**config), preprocessor=None)
    lm.quantize(mode)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        lm.load_weights(path)
    messages = [str(w.message) for w in caught]
    assert any("once more" in message for message in messages) == (mode == "int4")
    assert error(lm, LOGITS[mode]) < {"int8": 0.06, "int4": 1}[mode]
