"""Models that version 0.1.0 saved load, and generate the same text as before."""

import json
from pathlib import Path

import keras
import pytest
from tensorflow_marks import first_on_tensorflow

from keras_openllama import OpenLlamaCausalLM

FIXTURES = Path(__file__).parents[1] / "fixtures"
EXPECTED = json.loads((FIXTURES / "expected_0_1.json").read_text())


def from_preset():
    return OpenLlamaCausalLM.from_preset(str(FIXTURES / "keras_hub_preset_0_1"))


def from_keras_file():
    return keras.saving.load_model(FIXTURES / "model_0_1.keras", compile=False)


@first_on_tensorflow("load", [from_preset, from_keras_file])
def test_generate_gives_the_same_text_for_a_model_saved_by_0_1(load):
    lm = load()
    if load is from_keras_file:
        lm.compile()
    assert lm.generate(EXPECTED["prompt"], max_new_tokens=8) == EXPECTED["text"]


def test_from_preset_names_an_unknown_argument():
    for name in ("easylm", "num_experts"):
        with pytest.raises(ValueError, match=f"has no argument '{name}'"):
            OpenLlamaCausalLM.from_preset("open_llama_nano", **{name: "x"})
    with pytest.raises(ValueError, match="has no argument 'num_experts'"):
        OpenLlamaCausalLM.backbone_cls.from_preset("open_llama_nano", num_experts=2)
