"""Indexes of sharded weights that are stale or name missing files."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_models import TinyShape, in_transformers

from keras_openllama import OpenLlamaBackbone, OpenLlamaCausalLM

pytestmark = pytest.mark.backend_free

SHAPE = TinyShape("grouped", 6, 2, 20, hidden_dim=60, context=64)
INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")


@pytest.fixture
def model(tmp_path):
    """A directory in transformers format with its weights in one safetensors file."""
    in_transformers(SHAPE).save_pretrained(tmp_path)
    return tmp_path


def to_bin(directory):
    tensors = load_file(directory / "model.safetensors")
    torch.save(tensors, directory / "pytorch_model.bin")
    (directory / "model.safetensors").unlink()


def write_index(directory, name, shard="model-00001-of-00002.safetensors"):
    weight_map = {"model.norm.weight": shard}
    (directory / name).write_text(json.dumps({"weight_map": weight_map}))


def load(directory):
    return OpenLlamaCausalLM.from_preset(directory, preprocessor=None)


def values_of(lm):
    return [np.asarray(weight) for weight in lm.weights]


@pytest.mark.parametrize(
    ("whole", "name", "shards"),
    [
        ("safetensors", INDEXES[0], "missing"),
        ("safetensors", INDEXES[0], "old"),
        ("safetensors", INDEXES[0], "damaged index"),
        ("bin", INDEXES[0], "missing"),
        ("bin", INDEXES[1], "missing"),
        ("bin", INDEXES[1], "old"),
        ("bin", INDEXES[1], "damaged index"),
    ],
)
def test_from_preset_reads_whole_weights_beside_a_stale_index(
    whole, name, shards, model
):
    expected = values_of(load(model))
    if whole == "bin":
        to_bin(model)
    write_index(model, name, "old.bin")
    if shards == "old":
        (model / "old.bin").write_bytes(b"not to be opened")
    if shards == "damaged index":
        (model / name).write_text("{")
    with pytest.warns(UserWarning, match=f"{name} is ignored, because .* all weights"):
        lm = load(model)
    for found, value in zip(values_of(lm), expected, strict=True):
        np.testing.assert_array_equal(found, value)


def test_from_preset_of_two_incomplete_indexes_names_the_missing_file(model):
    (model / "model.safetensors").unlink()
    for name in INDEXES:
        write_index(model, name)
    message = r"index\.json names the file model-00001.*missing.*delete the index"
    with pytest.raises(OSError, match=message):
        load(model)


def test_from_preset_without_weights_names_files_that_it_does_not_read(model):
    (model / "model.safetensors").rename(model / "consolidated.safetensors")
    (model / "ggml.gguf").write_text("")
    message = r"No weights were found.* It has consolidated\.safetensors, ggml\.gguf, w"
    with pytest.raises(OSError, match=message):
        load(model)


def test_conversion_reads_whole_weights_of_keras_beside_a_stale_index(model, tmp_path):
    from keras_openllama.convert import convert

    load(model).save_to_preset(tmp_path / "preset")
    index = {"weight_map": {"/layers/embedding/vars": "model_00000.weights.h5"}}
    (tmp_path / "preset" / "model.weights.json").write_text(json.dumps(index))
    convert(tmp_path / "preset", tmp_path / "out", to="transformers", tokenizer=False)
    expected = OpenLlamaBackbone.from_preset(tmp_path / "preset").weights
    found = OpenLlamaBackbone.from_preset(tmp_path / "out").weights
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))
