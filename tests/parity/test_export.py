"""Exported models compute the same in transformers as in Keras."""

import json

import keras
import numpy as np
import pytest
import torch
import transformers
from tensorflow_marks import first_on_tensorflow
from tiny_models import SHAPES, TinyShape, assert_close, batch, random_lm
from tokenizer_models import trained_model

from keras_openllama import OpenLlamaCausalLM

GREEDY = [shape for shape in SHAPES if shape.name != "multi_head"]


def in_transformers(directory):
    """Loads a model without further arguments, as a user would."""
    return transformers.AutoModelForCausalLM.from_pretrained(directory).eval()


def greedy(model, prompt, count):
    """Returns the prompt and the greedy continuation of transformers."""
    ids = torch.tensor(prompt)[None]
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=count,
        do_sample=False,
        eos_token_id=None,
    )
    return out[0].tolist()


@first_on_tensorflow("shape", SHAPES, ids=str)
def test_logits_of_an_export_match(shape, tmp_path):
    lm = random_lm(shape)
    lm.export_to_transformers(tmp_path / "out")
    ids = batch(shape, length=60)
    with torch.no_grad():
        expected = in_transformers(tmp_path / "out")(torch.tensor(ids)).logits
    assert_close(lm.score(ids), expected)


@pytest.mark.slow_on_tensorflow
@pytest.mark.parametrize("shape", GREEDY, ids=str)
def test_generate_matches_200_greedy_tokens_of_an_export(shape, tmp_path):
    lm = random_lm(shape)
    lm.export_to_transformers(tmp_path / "out")
    prompt = batch(shape, 1, 8)
    expected = greedy(in_transformers(tmp_path / "out"), prompt[0].tolist(), 200)
    inputs = {"token_ids": prompt, "padding_mask": np.ones_like(prompt, "bool")}
    ours = lm.generate(inputs, max_new_tokens=200, stop_token_ids=None)
    assert ours["token_ids"][0].tolist() == expected


@pytest.mark.slow_on_tensorflow
def test_export_of_nano_matches_with_its_tokenizer(tmp_path):
    lm = OpenLlamaCausalLM.from_preset("open_llama_nano")
    lm.export_to_transformers(tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    theirs = in_transformers(tmp_path / "out")
    prompt = "The captain  looked at the sea\n and said,"
    inputs = tokenizer(prompt, return_tensors="pt")
    ids = lm.preprocessor.tokenizer(prompt, add_bos=True)
    assert inputs["input_ids"][0].tolist() == ids
    with torch.no_grad():
        assert_close(lm.score(np.array([ids])), theirs(**inputs).logits)
    expected = greedy(theirs, ids, 200)
    text = lm.generate(prompt, max_new_tokens=200, stop_token_ids=None)
    assert text == tokenizer.decode(expected, skip_special_tokens=True)


@pytest.mark.parametrize("kind", ["linear", "dynamic"])
@pytest.mark.slow_on_tensorflow
def test_export_preserves_rope_scaling(kind, tmp_path):
    shape = TinyShape("scaled", 4, 2, 16, context=32)
    lm = random_lm(
        shape,
        rope_scaling={"rope_type": kind, "factor": 2.0},
        rope_max_wavelength=50_000.0,
    )
    lm.export_to_transformers(tmp_path / "out")
    ids = batch(
        shape, length=50
    )  # Longer than the context, where the two kinds differ.
    with torch.no_grad():
        expected = in_transformers(tmp_path / "out")(torch.tensor(ids)).logits
    assert_close(lm.score(ids), expected)


@first_on_tensorflow("dtype", ["bfloat16", "float16"])
def test_export_writes_the_dtype_of_config_json(dtype, tmp_path):
    lm = random_lm(SHAPES[0])
    lm.export_to_transformers(tmp_path / "out", dtype=dtype)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == dtype
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype="auto"
    )
    assert {p.dtype for p in model.parameters()} == {getattr(torch, dtype)}
    theirs = dict(model.named_parameters())["model.norm.weight"].detach()
    ours = keras.ops.convert_to_numpy(lm.backbone.final_norm.scale)
    assert torch.equal(theirs, torch.tensor(ours).to(getattr(torch, dtype)))


def test_export_rejects_merged_adapters_beyond_float16(tmp_path):
    lm = random_lm(SHAPES[2], dtype="float16")
    lm.backbone.enable_lora(2)
    for weight in lm.trainable_weights:
        weight.assign(np.full(weight.shape, 1e3))
    with pytest.raises(ValueError, match=r"query/kernel: .*beyond float16's range"):
        lm.export_to_transformers(tmp_path / "out")
    lm.export_to_transformers(tmp_path / "out", dtype="float32")


@first_on_tensorflow("dtype", ["float32", "mixed_bfloat16"])
def test_export_merges_lora_adapters(dtype, tmp_path):
    lm = random_lm(SHAPES[2], dtype=dtype)
    lm.backbone.enable_lora(2)
    random = np.random.default_rng(0)
    for (
        weight
    ) in lm.trainable_weights:  # One factor of each pair is initialized with zeros.
        weight.assign(0.1 * random.standard_normal(weight.shape))
    lm.export_to_transformers(tmp_path / "out")
    # Compared in float32, the dtype of the weights, for each compute dtype.
    wide = random_lm(SHAPES[2])
    wide.backbone.enable_lora(2)
    for ours, theirs in zip(wide.weights, lm.weights, strict=True):
        ours.assign(keras.ops.convert_to_numpy(theirs))
    ids = batch(SHAPES[2], length=20)
    with torch.no_grad():
        expected = in_transformers(tmp_path / "out")(torch.tensor(ids)).logits
    assert_close(wide.score(ids), expected)


@pytest.mark.parametrize("keep_spaces", [True, False], ids=["v2", "v1"])
@pytest.mark.slow_on_tensorflow
def test_auto_tokenizer_of_an_export_pads_on_the_left_and_masks(keep_spaces, tmp_path):
    lm = random_lm(SHAPES[0], trained_model(keep_spaces))
    lm.export_to_transformers(tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    texts = ["The  import statement", "A"]
    inputs = tokenizer(texts, return_tensors="pt", padding=True)
    assert inputs["attention_mask"][1].tolist()[:2] == [0, 0]
    theirs = in_transformers(tmp_path / "out").generate(
        **inputs, max_new_tokens=12, do_sample=False, eos_token_id=None
    )
    for text, row in zip(texts, theirs.tolist(), strict=True):
        ids = np.array([lm.preprocessor.tokenizer(text, add_bos=True)])
        prompt = {"token_ids": ids, "padding_mask": np.ones_like(ids, "bool")}
        ours = lm.generate(prompt, max_new_tokens=12, stop_token_ids=None)
        assert row[-ids.size - 12 :] == ours["token_ids"][0].tolist()
