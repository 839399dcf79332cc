"""Invalid architectures are rejected by name, whatever the source of the model."""

import json

import numpy as np
import pytest
from tiny_models import SHAPES, random_lm

from keras_openllama import OpenLlamaBackbone, OpenLlamaCausalLM
from keras_openllama.config import validate_architecture
from keras_openllama.convert import convert

pytestmark = pytest.mark.backend_free

NEEDED = {
    "vocabulary_size": 32000,
    "num_layers": 26,
    "num_query_heads": 32,
    "hidden_dim": 3200,
    "intermediate_dim": 8640,
}


def test_validate_architecture_fills_in_defaults():
    architecture = validate_architecture(NEEDED)
    assert architecture["head_dim"] == 100
    assert architecture["num_key_value_heads"] == 32
    assert architecture["rope_max_wavelength"] == 10000.0
    assert validate_architecture(architecture) == architecture
    assert (
        type(validate_architecture({**NEEDED, "num_layers": np.int64(2)})["num_layers"])
        is int
    )
    assert validate_architecture({**NEEDED, "num_layers": 2.0})["num_layers"] == 2
    tiny = dict.fromkeys(NEEDED, 4.0)
    assert len(OpenLlamaBackbone(**tiny, head_dim=2.0).transformer_layers) == 4


@pytest.mark.parametrize(
    "name, value",
    [
        ("num_query_heads", 0),
        ("num_query_heads", "4"),
        ("num_query_heads", 33),
        ("num_layers", 2.5),
        ("num_layers", True),
        ("num_key_value_heads", 5),
        ("head_dim", 1),
        ("max_sequence_length", -5),
        ("layer_norm_epsilon", "x"),
        ("layer_norm_epsilon", float("nan")),
        ("rope_max_wavelength", 0),
        ("rope_scaling", {"rope_type": "linear"}),
        ("rope_scaling", "linear"),
    ],
)
def test_validate_architecture_names_an_invalid_value(name, value):
    with pytest.raises(ValueError, match=f"Received: .*{name}="):
        validate_architecture({**NEEDED, name: value})
    with pytest.raises(ValueError, match=f"Received: .*{name}="):
        OpenLlamaBackbone(**{**NEEDED, "num_layers": 1, name: value})


def test_validate_architecture_names_missing_and_unknown_arguments():
    with pytest.raises(ValueError, match=r"Missing: vocabulary_size.* Unknown: none"):
        validate_architecture(
            {k: v for k, v in NEEDED.items() if k != "vocabulary_size"}
        )
    with pytest.raises(ValueError, match=r"Missing: none.* Unknown: num_experts"):
        validate_architecture({**NEEDED, "num_experts": 8})


@pytest.mark.parametrize(
    "setting, value, name",
    [
        ("num_attention_heads", 0, "num_query_heads"),
        ("num_hidden_layers", 1.5, "num_layers"),
        ("rms_norm_eps", "x", "layer_norm_epsilon"),
        ("rope_scaling", "linear", "RoPE scaling"),
        ("rope_scaling", {"rope_type": "linear", "factor": -2}, "rope_scaling"),
    ],
)
def test_from_preset_and_convert_reject_an_invalid_config(
    setting, value, name, tmp_path
):
    random_lm(SHAPES[0]).export_to_transformers(tmp_path / "a")
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    config[setting] = value
    (tmp_path / "a" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=name):
        OpenLlamaCausalLM.from_preset(str(tmp_path / "a"), preprocessor=None)
    with pytest.raises(ValueError, match=name):
        convert(tmp_path / "a", tmp_path / "b", "easylm")
    assert not (tmp_path / "b").exists()
