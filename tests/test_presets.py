"""presets/*.json state the published models completely."""

import json

import pytest
from checkout import ROOT

pytestmark = pytest.mark.backend_free

PRESETS = ROOT / "presets"

# From the published config.json files: layers, heads, head_dim, width, ff, parameters.
SIZES = {
    "3b": (26, 32, 100, 3200, 8640, 3_426_473_600),
    "7b": (32, 32, 128, 4096, 11008, 6_738_415_616),
    "13b": (40, 40, 128, 5120, 13824, 13_015_864_320),
}
# Preset: its size, its tokenizer, the repository that its weights are in.
PUBLISHED = {
    "open_llama_3b": ("3b", "v1", "open_llama_3b"),
    "open_llama_7b": ("7b", "v1", "open_llama_7b"),
    "open_llama_13b": ("13b", "v1", "open_llama_13b"),
    "open_llama_3b_v2": ("3b", "v2", "open_llama_3b_v2"),
    "open_llama_7b_v2": ("7b", "v2", "open_llama_7b_v2"),
    "open_llama_3b_v3": ("3b", "v2", "open_llama_3b_v2"),
}
NAMES = [*PUBLISHED, "open_llama_nano"]

KEYS = {
    *("name", "description", "version", "parameters", "architecture", "tokenizer"),
    *("weights", "notice", "license", "provenance", "recipe"),
}
ARCHITECTURE_KEYS = {
    *("vocabulary_size", "num_layers", "num_query_heads", "num_key_value_heads"),
    *("head_dim", "hidden_dim", "intermediate_dim", "rope_max_wavelength"),
    *("layer_norm_epsilon", "max_sequence_length", "initializer_std"),
}
TOKENIZER_KEYS = {
    *("version", "file", "start_token_id", "end_token_id", "unk_token_id"),
    "keeps_spaces",
}


def read_preset(name):
    return json.loads((PRESETS / f"{name}.json").read_text())


def parameters_of(architecture):
    """Counts the parameters: no biases, embeddings and head not tied."""
    width = architecture["hidden_dim"]
    query = architecture["num_query_heads"] * architecture["head_dim"]
    key_value = architecture["num_key_value_heads"] * architecture["head_dim"]
    layer = (
        2 * width * query  # query and output
        + 2 * width * key_value
        + 3 * width * architecture["intermediate_dim"]  # gate, up and down
        + 2 * width  # the two norms
    )
    vocabulary = 2 * architecture["vocabulary_size"] * width
    return vocabulary + architecture["num_layers"] * layer + width


def test_there_is_one_file_for_each_preset():
    assert sorted(path.stem for path in PRESETS.glob("*.json")) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_preset_has_every_key(name):
    preset = read_preset(name)
    assert preset.keys() == KEYS
    assert preset["name"] == name
    assert preset["description"]
    assert preset["architecture"].keys() == ARCHITECTURE_KEYS
    assert preset["tokenizer"].keys() == TOKENIZER_KEYS
    assert preset["license"] == "Apache-2.0"
    assert preset["provenance"]


@pytest.mark.parametrize("name", NAMES)
def test_preset_parameters_match_its_architecture(name):
    preset = read_preset(name)
    assert parameters_of(preset["architecture"]) == preset["parameters"]


@pytest.mark.parametrize("name", PUBLISHED)
def test_preset_has_the_published_architecture(name):
    size, _, _ = PUBLISHED[name]
    layers, heads, head_dim, width, intermediate, parameters = SIZES[size]
    preset = read_preset(name)
    assert preset["parameters"] == parameters
    assert preset["architecture"] == {
        "vocabulary_size": 32000,
        "num_layers": layers,
        "num_query_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": head_dim,
        "hidden_dim": width,
        "intermediate_dim": intermediate,
        "rope_max_wavelength": 10000.0,
        "layer_norm_epsilon": 1e-6,
        "max_sequence_length": 2048,
        "initializer_std": 0.02,
    }


@pytest.mark.parametrize("name", PUBLISHED)
def test_preset_has_the_published_tokenizer(name):
    _, version, _ = PUBLISHED[name]
    preset = read_preset(name)
    assert preset["version"] == version
    assert preset["tokenizer"] == {
        "version": version,
        "file": "tokenizer.model",
        "start_token_id": 1,
        "end_token_id": 2,
        "unk_token_id": 0,
        "keeps_spaces": version == "v2",
    }


@pytest.mark.parametrize("name", PUBLISHED)
def test_preset_has_the_published_weights_and_config(name):
    _, _, repository = PUBLISHED[name]
    preset = read_preset(name)
    handle = f"openlm-research/{repository}"
    assert preset["weights"] == {
        "transformers": f"hf://{handle}",
        "easylm": f"hf://{handle}_easylm",
    }
    url = f"https://huggingface.co/{handle}/blob/main/config.json"
    assert preset["provenance"]["config"] == url


@pytest.mark.parametrize("name", NAMES)
def test_only_3b_v3_has_a_notice(name):
    notice = read_preset(name)["notice"]
    if name == "open_llama_3b_v3":
        assert "open_llama_3b_v2" in notice
    else:
        assert notice is None


def test_embedded_weights_are_next_to_their_preset():
    weights = read_preset("open_llama_nano")["weights"]["transformers"]
    present = {path.name for path in (PRESETS / weights).iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.model"} <= present


@pytest.mark.parametrize("name", NAMES)
def test_readme_lists_the_preset_correctly(name):
    readme = (PRESETS.parent / "README.md").read_text()
    (row,) = (line for line in readme.splitlines() if line.startswith(f"| `{name}` |"))
    preset = read_preset(name)
    assert f"| {preset['parameters']:,} |" in row
    if name in PUBLISHED:
        assert f"| {preset['tokenizer']['version']} |" in row
