"""Exports in transformers format are complete, and llama.cpp can convert them."""

import json
import os

import gguf
import numpy as np
import pytest
import safetensors.numpy
import sentencepiece
import transformers
from fake_devices import run_on_eight_devices
from tiny_models import TinyShape, random_lm
from tokenizer_models import trained_model

from keras_openllama import (
    OpenLlamaCausalLM,
    OpenLlamaCausalLMPreprocessor,
    OpenLlamaTokenizer,
    presets,
)
from keras_openllama.checkpoints import model_card
from keras_openllama.checkpoints.contents import ModelContents
from keras_openllama.convert import convert
from keras_openllama.loading.load import describe_origin

pytestmark = pytest.mark.backend_free

SHAPE = TinyShape("grouped", 6, 2, 20, hidden_dim=60, num_layers=3, context=64)
FILES = {
    "README.md",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
}


@pytest.fixture(scope="module", params=[True, False], ids=["v2", "v1"])
def exported(request, tmp_path_factory):
    """An export of a random model: whether it preserves spaces, and its directory."""
    out = tmp_path_factory.mktemp("export") / "out"
    random_lm(SHAPE, trained_model(request.param)).export_to_transformers(out)
    return request.param, out


def read_json(path):
    return json.loads(path.read_text())


def test_export_writes_every_file(exported):
    keep_spaces, out = exported
    assert set(os.listdir(out)) == FILES
    assert (out / "tokenizer.model").read_bytes() == trained_model(keep_spaces)


def test_export_writes_every_size_to_config_json(exported):
    config = read_json(exported[1] / "config.json")
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["rope_theta"] == 10000.0
    assert config["num_key_value_heads"] == 2
    assert config["head_dim"] == 20
    assert config["rms_norm_eps"] == 1e-6
    assert config["max_position_embeddings"] == 64
    assert config["dtype"] == "float32"
    assert (config["bos_token_id"], config["eos_token_id"]) == (1, 2)
    generation = read_json(exported[1] / "generation_config.json")
    assert generation == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def test_export_writes_weights_that_safetensors_reads(exported):
    lm = OpenLlamaCausalLM.from_preset(str(exported[1]))
    tensors = safetensors.numpy.load_file(exported[1] / "model.safetensors")
    norm = np.asarray(lm.backbone.final_norm.scale.value)
    assert np.array_equal(tensors["model.norm.weight"], norm)
    with safetensors.safe_open(exported[1] / "model.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"}


def test_auto_tokenizer_encodes_like_sentencepiece(exported):
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported[1])
    processor = sentencepiece.SentencePieceProcessor(
        model_file=str(exported[1] / "tokenizer.model")
    )
    texts = ["The  import\n\n    statement", " a ", "\t", "日本 é\u0301 🙂", "  x" * 9]
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        assert ids == [1, *processor.encode(text)]
        back = tokenizer.decode(ids, skip_special_tokens=True)
        assert back == processor.decode(ids)
    assert tokenizer("a</s>", split_special_tokens=True)["input_ids"][-1] != 2
    assert tokenizer.model_max_length == 64


def test_llama_tokenizer_differs_as_the_model_card_says(exported):
    keep_spaces, out = exported
    card = " ".join((out / "README.md").read_text().split())
    assert "**Do not use `LlamaTokenizer`**" in card
    right = transformers.AutoTokenizer.from_pretrained(out)
    theirs = transformers.LlamaTokenizer.from_pretrained(out)
    plain = ["The import statement", "def f():\n  return", "日本 🙂\n\n"]
    wrong = " begins with a space" if keep_spaces else "a run  of spaces"
    assert ("begins with a space" in card) == keep_spaces
    assert ("merges runs of spaces" in card) != keep_spaces
    assert right(wrong)["input_ids"] != theirs(wrong)["input_ids"]
    if keep_spaces:
        assert right(plain)["input_ids"] == theirs(plain)["input_ids"]
    else:
        assert right(plain[0])["input_ids"] == theirs(plain[0])["input_ids"]


def test_export_without_preprocessor_has_no_tokenizer_files(tmp_path):
    lm = random_lm(SHAPE)
    lm.export_to_transformers(tmp_path / "out")
    assert not list((tmp_path / "out").glob("*token*"))
    assert "no tokenizer" in (tmp_path / "out" / "README.md").read_text()
    lm = random_lm(SHAPE, trained_model(True))
    lm.export_to_transformers(tmp_path / "out", tokenizer=False, force=True)
    assert not list((tmp_path / "out").glob("*token*"))


# ----- The model card


@pytest.mark.parametrize("name", presets.registry())
def test_model_card_of_a_preset_has_license_and_sources(name):
    preset = presets.find(name)
    contents = ModelContents(dict(preset.config), {}, origin=name)
    card = model_card.model_card(contents, "float16", preset.version == "v1")
    _, header, _ = card.split("---\n", 2)
    assert "license: apache-2.0" in header
    if name != "open_llama_nano":
        link = preset.handles["transformers"].removeprefix("hf://")
        assert f"base_model: {link}" in header
        assert f"https://huggingface.co/{link}" in card
    assert "RedPajama" in card or name == "open_llama_nano"
    assert preset.notice is None or preset.notice in card
    assert ("not a multiple of 256" in card) == (preset.config["hidden_dim"] == 3200)
    assert "None" not in card and "{" not in card.split("```")[-1]


@pytest.mark.parametrize("name", ["3b_v2", "open_llama_3b_v2"])
def test_model_card_of_a_directory_named_like_a_preset_has_no_license(
    name, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    random_lm(SHAPE, trained_model(True)).export_to_transformers(name)
    lm = OpenLlamaCausalLM.from_preset(f"./{name}")
    lm.export_to_transformers("out")
    assert "license:" not in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    "source, options, expected",
    [
        ("3b_v2", {}, "open_llama_3b_v2"),
        ("hf://openlm-research/open_llama_3b_v2", {}, "open_llama_3b_v2"),
        (
            "open_llama_7b",
            {"revision": "main"},
            "hf://openlm-research/open_llama_7b at main",
        ),
        ("hf://me/mine", {}, "hf://me/mine"),
        ("3b_v2", {"is_file": True}, "the file 3b_v2"),
        ("/home/me/model", {}, "the directory model"),
    ],
)
def test_describe_origin_names_a_preset_only_for_published_weights(
    source, options, expected
):
    assert describe_origin(source, **options) == expected


def test_export_preserves_the_settings_of_the_preprocessor(tmp_path):
    lm = random_lm(SHAPE, trained_model(True))
    lm.preprocessor.add_start_token = False
    lm.preprocessor.sequence_length = 31
    lm.export_to_transformers(tmp_path / "hf")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert tokenizer("the sea")["input_ids"] == lm.preprocessor.tokenizer("the sea")
    lm.save_to_preset(tmp_path / "a")
    convert(tmp_path / "a", tmp_path / "b", "keras", dtype="bfloat16")
    again = OpenLlamaCausalLM.from_preset(str(tmp_path / "b")).preprocessor
    assert again.add_start_token is False
    assert again.sequence_length == 31


def test_export_rejects_a_tokenizer_of_another_model(tmp_path):
    tokenizer = OpenLlamaTokenizer(trained_model(True))
    backbone = random_lm(SHAPE).backbone  # Of 199 embeddings.
    lm = OpenLlamaCausalLM(backbone, OpenLlamaCausalLMPreprocessor(tokenizer))
    with pytest.raises(ValueError, match="512 pieces but the model has 199"):
        lm.export_to_transformers(tmp_path / "out")


def test_model_card_of_random_weights_has_no_origin(tmp_path):
    lm = OpenLlamaCausalLM.from_preset("open_llama_nano", load_weights=False)
    lm.export_to_transformers(tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "weights is unknown" in card and "license:" not in card


def test_convert_without_tokenizer_preserves_the_control_ids(tmp_path):
    lm = random_lm(SHAPE)
    lm.export_to_transformers(tmp_path / "a")
    for name in ("config.json", "generation_config.json"):
        config = read_json(tmp_path / "a" / name)
        config.update(bos_token_id=7, eos_token_id=8)
        (tmp_path / "a" / name).write_text(json.dumps(config))
    convert(tmp_path / "a", tmp_path / "b", "transformers", tokenizer=False)
    generation = read_json(tmp_path / "b" / "generation_config.json")
    assert (generation["bos_token_id"], generation["eos_token_id"]) == (7, 8)


def test_model_card_of_an_unknown_model_has_no_license(tmp_path):
    lm = random_lm(SHAPE, trained_model(True))
    lm.export_to_transformers(tmp_path / "secret_folder")
    card = (tmp_path / "secret_folder" / "README.md").read_text()
    assert "license:" not in card and "weights is unknown" in card
    lm = OpenLlamaCausalLM.from_preset(str(tmp_path / "secret_folder"))
    lm.export_to_transformers(tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert (
        "loaded from the directory secret_folder." in card and str(tmp_path) not in card
    )


# ----- llama.cpp


def test_gguf_maps_every_tensor_and_token(exported):
    _, out = exported
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, SHAPE.num_layers)
    tensors = safetensors.numpy.load_file(out / "model.safetensors")
    found = {names.get_name(tensor, (".weight",)) for tensor in tensors}
    blocks = (
        "attn_norm attn_q attn_k attn_v attn_output ffn_norm ffn_gate ffn_up ffn_down"
    )
    assert found == {
        "token_embd.weight",
        "output_norm.weight",
        "output.weight",
        *(f"blk.{i}.{b}.weight" for i in range(3) for b in blocks.split()),
    }
    # Its converter splits these shapes into heads by num_attention_heads and
    # num_key_value_heads.
    assert tensors["model.layers.0.self_attn.q_proj.weight"].shape == (6 * 20, 60)
    assert tensors["model.layers.0.self_attn.k_proj.weight"].shape == (2 * 20, 60)
    special = gguf.SpecialVocab(out, n_vocab=512)
    assert special.special_token_ids == {"bos": 1, "eos": 2, "unk": 0, "pad": 0}
    assert special.add_special_token["bos"] is True
    assert special.add_special_token["eos"] is False
    vocabulary = gguf.SentencePieceVocab(out)
    assert vocabulary.vocab_size == 512
    assert vocabulary.fname_tokenizer == out / "tokenizer.model"


# ----- Sharded models

SHARDED = """
import sys
import keras
from keras_openllama import OpenLlamaCausalLM

devices = keras.distribution.list_devices()
assert len(devices) == 8
mesh = keras.distribution.DeviceMesh((2, 4), ("data", "model"), devices)
rules = keras.distribution.LayoutMap(mesh)
rules[".*(query|key|value|gate|up|lm_head)/kernel"] = ("model", "data")
rules[".*(output|down)/kernel"] = ("data", "model")
rules["token_embedding/embeddings"] = ("model", None)
distribution = keras.distribution.ModelParallel(layout_map=rules, batch_dim_name="data")
with distribution.scope():
    lm = OpenLlamaCausalLM.from_preset(sys.argv[1])
    assert not lm.lm_head.kernel.value.sharding.is_fully_replicated
    lm.export_to_transformers(sys.argv[2], max_shard_size="100KB")
"""


def test_export_of_a_model_on_eight_devices_is_bit_exact(tmp_path):
    shape = TinyShape("sharded", 4, 4, 16)
    random_lm(shape, trained_model(True)).export_to_transformers(tmp_path / "a")
    run_on_eight_devices(SHARDED, tmp_path / "a", tmp_path / "b")
    expected = safetensors.numpy.load_file(tmp_path / "a" / "model.safetensors")
    shards = list((tmp_path / "b").glob("*.safetensors"))
    assert len(shards) > 2
    parts = {}
    for shard in shards:
        parts.update(safetensors.numpy.load_file(shard))
    assert parts.keys() == expected.keys()
    assert all(np.array_equal(parts[name], array) for name, array in expected.items())
