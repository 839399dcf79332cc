"""`export_to_onnx`: a directory that ONNX Runtime runs without this package."""

import json

import numpy as np
import onnxruntime
import pytest
import tiny_models
from tensorflow_marks import first_on_tensorflow

from keras_openllama import OpenLlamaCausalLM
from keras_openllama.generation.onnx_runtime import decoder, graph

CACHES = ("key", "value")


def generate(directory, ids, new):
    """Greedy decoding by what the files say, as ONNX Runtime GenAI does it."""
    config = json.loads((directory / "genai_config.json").read_text())["model"]
    decoder = config["decoder"]
    session = onnxruntime.InferenceSession(str(directory / decoder["filename"]))
    names, outputs = decoder["inputs"], decoder["outputs"]
    shape = (1, decoder["num_key_value_heads"], 64, decoder["head_size"])
    layers = range(decoder["num_hidden_layers"])
    caches = {
        names[f"past_{kind}_names"] % layer: np.zeros(shape, "float32")
        for layer in layers
        for kind in CACHES
    }
    order = [
        outputs["logits"],
        *(outputs[f"present_{k}_names"] % layer for layer in layers for k in CACHES),
    ]
    ids, fed = list(ids), 0
    for _ in range(new):
        inputs = {
            names["input_ids"]: np.array([ids[fed:]], "int64"),
            names["attention_mask"]: np.ones((1, len(ids)), "int64"),
            **caches,
        }
        logits, *values = session.run(order, inputs)
        caches, fed = dict(zip(caches, values, strict=True)), len(ids)
        ids.append(int(logits[0, -1].argmax()))
    return ids


@first_on_tensorflow("shape", tiny_models.SHAPES, ids=str)
@first_on_tensorflow("mode", [None, "int8", "int4"])
def test_export_to_onnx_generates_as_the_model(shape, mode, tmp_path, monkeypatch):
    # `generate` has other products than a file, which round activations otherwise.
    monkeypatch.setattr(graph, "ACTIVATION_ACCURACY", 1)
    monkeypatch.setattr(decoder, "native_library", lambda: None)
    lm = tiny_models.random_lm(shape, initializer_std=0.2)
    if mode:
        lm.quantize(mode)
    lm.export_to_onnx(tmp_path / "onnx")
    ids = tiny_models.batch(shape, 1, 6)
    inputs = {"token_ids": ids, "padding_mask": np.ones_like(ids)}
    expected = lm.generate(inputs, max_new_tokens=12, stop_token_ids=None)
    found = generate(tmp_path / "onnx", ids[0].tolist(), 12)
    assert found == expected["token_ids"][0].tolist()


@pytest.mark.slow_on_tensorflow
def test_export_to_onnx_writes_the_tokenizer(tmp_path):
    lm = OpenLlamaCausalLM.from_preset("open_llama_nano")
    lm.export_to_onnx(tmp_path / "onnx")
    names = {path.name for path in (tmp_path / "onnx").iterdir()}
    assert {"tokenizer.json", "tokenizer_config.json", "tokenizer.model"} <= names
    assert not names & {"config.json", "model.safetensors"}
    config = json.loads((tmp_path / "onnx" / "genai_config.json").read_text())
    assert config["model"]["eos_token_id"] == [2]
    assert config["model"]["context_length"] == 256


@pytest.mark.slow_on_tensorflow
def test_export_to_onnx_replaces_a_model_only_with_force(tmp_path):
    lm = tiny_models.random_lm(tiny_models.SHAPES[0])
    lm.export_to_onnx(tmp_path / "onnx")
    with pytest.raises(FileExistsError, match="force"):
        lm.export_to_onnx(tmp_path / "onnx")
    lm.export_to_onnx(tmp_path / "onnx", force=True)
    (tmp_path / "onnx" / "thesis.tex").write_text("")
    with pytest.raises(FileExistsError, match=r"thesis\.tex"):
        lm.export_to_onnx(tmp_path / "onnx", force=True)


def test_export_to_onnx_rejects_what_the_graph_cannot_compute(tmp_path):
    scaling = {"rope_type": "dynamic", "factor": 2.0}
    lm = tiny_models.random_lm(tiny_models.SHAPES[0], rope_scaling=scaling)
    with pytest.raises(ValueError, match="dynamic RoPE scaling"):
        lm.export_to_onnx(tmp_path / "onnx")
    assert list(tmp_path.iterdir()) == []
