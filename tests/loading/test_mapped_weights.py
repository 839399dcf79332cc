"""`from_preset` in the dtype of the file maps weights, and never writes to the file."""

import dataclasses
import hashlib
import json
import os
from pathlib import Path

import keras
import numpy as np
import pytest
import tiny_models
from mapped_memory import files_of, needs_mapped_weights

from keras_openllama import OpenLlamaCausalLM
from keras_openllama.backend.keras_private import embeddings_variable
from keras_openllama.checkpoints.files import safetensors

SHAPE = tiny_models.SHAPES[0]


def exported(directory, shape=SHAPE, dtype="float32", **options):
    lm = tiny_models.random_lm(shape, **options)
    lm.export_to_transformers(directory, dtype=dtype)
    return lm, str(directory / "model.safetensors")


def load(directory, dtype="float32", **options):
    return OpenLlamaCausalLM.from_preset(
        directory, dtype=dtype, preprocessor=None, **options
    )


def matrices(lm):
    return [weight for weight in lm.weights if len(weight.shape) == 2]


def digest(file):
    with open(file, "rb") as content:
        return hashlib.sha256(content.read()).hexdigest()


def as_float32(weight):
    return keras.ops.convert_to_numpy(keras.ops.cast(weight, "float32"))


@needs_mapped_weights
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_from_preset_maps_weights_of_the_same_dtype(tmp_path, dtype):
    _, file = exported(tmp_path / "model", dtype=dtype)
    assert set(files_of(matrices(load(tmp_path / "model", dtype)))) == {file}


@needs_mapped_weights
def test_from_preset_maps_every_matrix_beside_norms_of_odd_sizes(tmp_path):
    sizes = {"hidden_dim": 100, "intermediate_dim": 48, "vocabulary_size": 208}
    shape = dataclasses.replace(SHAPE, **sizes)
    lm, file = exported(tmp_path / "model", shape)
    assert all(4 * np.prod(weight.shape) % 64 == 0 for weight in matrices(lm))
    assert set(files_of(matrices(load(tmp_path / "model")))) == {file}


@needs_mapped_weights
@pytest.mark.parametrize("options", [{"dtype": "bfloat16"}, {"quantization": "int4"}])
def test_from_preset_copies_weights_that_it_converts(tmp_path, options):
    _, file = exported(tmp_path / "model")
    assert file not in files_of(matrices(load(tmp_path / "model", **options)))


@needs_mapped_weights
def test_from_preset_copies_weights_that_are_not_aligned(tmp_path):
    lm, file = exported(tmp_path / "model")
    content = Path(file).read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = content[8:end] + b" " * 8  # The tensors begin 8 bytes later.
    length = len(header).to_bytes(8, "little")
    Path(file).write_bytes(length + header + content[end:])
    loaded = load(tmp_path / "model")
    assert file not in files_of(matrices(loaded))
    for expected, found in zip(lm.weights, loaded.weights, strict=True):
        np.testing.assert_array_equal(as_float32(expected), as_float32(found))


@pytest.mark.parametrize("shape", tiny_models.SHAPES[:2], ids=str)
def test_from_preset_of_mapped_weights_gives_the_values_of_the_file(tmp_path, shape):
    lm, _ = exported(tmp_path / "model", shape)
    loaded = load(tmp_path / "model")
    for expected, found in zip(lm.weights, loaded.weights, strict=True):
        np.testing.assert_array_equal(as_float32(expected), as_float32(found))


def test_fit_and_assign_never_write_to_the_file_of_the_weights(tmp_path):
    _, file = exported(tmp_path / "model")
    before = digest(file)
    lm = load(tmp_path / "model")
    old = [as_float32(weight) for weight in lm.weights]
    lm.compile(
        optimizer=keras.optimizers.SGD(0.1),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    ids = tiny_models.batch(SHAPE, 4, 8)
    x = {"token_ids": ids, "padding_mask": np.ones_like(ids)}
    keras.Model.fit(lm, x, np.roll(ids, -1, axis=1), verbose=0)
    trained = [as_float32(weight) for weight in lm.weights]
    assert all((a != b).any() for a, b in zip(old, trained, strict=True))
    for weight in lm.weights:
        weight.assign(keras.ops.ones(weight.shape))
    assert all((as_float32(weight) == 1).all() for weight in lm.weights)
    assert digest(file) == before
    other = load(tmp_path / "model")
    for expected, found in zip(old, other.weights, strict=True):
        np.testing.assert_array_equal(expected, as_float32(found))


def test_from_preset_gives_tied_weights_memory_of_their_own(tmp_path):
    _, file = exported(tmp_path / "model")
    tensors = safetensors.read_safetensors(file)
    del tensors["lm_head.weight"]
    specs = {name: (t.shape, t.dtype) for name, t in tensors.items()}
    with open(tmp_path / "tied", "wb") as target:
        values = (tensor.array() for tensor in tensors.values())
        safetensors.write_safetensors(target, specs, values)
    (tmp_path / "tied").replace(file)
    config = tmp_path / "model" / "config.json"
    config.write_text(
        json.dumps(json.loads(config.read_text()) | {"tie_word_embeddings": True})
    )
    lm = load(tmp_path / "model")
    head = as_float32(lm.lm_head.kernel)
    embedding = lm.backbone.token_embedding.embeddings
    np.testing.assert_array_equal(as_float32(embedding), head)
    embeddings_variable(lm.backbone.token_embedding).assign(
        keras.ops.zeros(embedding.shape)
    )
    np.testing.assert_array_equal(as_float32(lm.lm_head.kernel), head)


def test_mapped_weights_outlive_the_file(tmp_path):
    lm, file = exported(tmp_path / "model")
    loaded = load(tmp_path / "model")
    other = tmp_path / "other"
    other.write_bytes(bytes(os.path.getsize(file)))
    other.replace(file)  # As a download or an export replaces it.
    for expected, found in zip(lm.weights, loaded.weights, strict=True):
        np.testing.assert_array_equal(as_float32(expected), as_float32(found))
