"""`from_preset` loads directories in transformers format, or says why it cannot."""

import json
import shutil

import keras
import numpy as np
import pytest
import torch
import transformers
from tensorflow_marks import first_on_tensorflow
from tiny_models import TinyShape, assert_close, batch, in_transformers

from keras_openllama import OpenLlamaBackbone, OpenLlamaCausalLM
from keras_openllama.checkpoints.transformers import backbone_arguments
from keras_openllama.config import validate_architecture

SHAPE = TinyShape("grouped", 6, 2, 20, hidden_dim=60, num_layers=3, context=64)
FORMATS = ("safetensors", "sharded safetensors", "bin", "sharded bin")
EMBEDDING = "model.embed_tokens.weight"
NORM = "model.norm.weight"
QUERY = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def theirs():
    return in_transformers(SHAPE)


def write(model, directory, form="bin", state=None):
    """Saves a model as current or old versions of transformers do."""
    shards = {"max_shard_size": "100KB"} if "sharded" in form else {}
    model.save_pretrained(directory, **shards)
    if "bin" in form:
        to_bin(directory, state)
    return directory


def to_bin(directory, state=None):
    """Replaces safetensors by `.bin` files with the same tensors."""
    from safetensors.torch import load_file

    index = directory / "model.safetensors.index.json"
    for number, path in enumerate(sorted(directory.glob("*.safetensors"))):
        tensors = state if state is not None else load_file(path)
        # Not every tensor begins at the start of its storage.
        first, *_ = tensors
        tensors[first] = torch.cat([tensors[first][:1], tensors[first]])[1:]
        name = path.name.replace("model", "pytorch_model").replace("safetensors", "bin")
        torch.save(tensors, directory / name)
        path.unlink()
        assert state is None or number == 0
    if index.exists():
        text = index.read_text().replace(".safetensors", ".bin")
        text = text.replace("model-0", "pytorch_model-0")
        (directory / "pytorch_model.bin.index.json").write_text(text)
        index.unlink()


def load(directory, **options):
    return OpenLlamaCausalLM.from_preset(str(directory), preprocessor=None, **options)


def set_config(directory, **settings):
    path = directory / "config.json"
    config = json.loads(path.read_text())
    config.update(settings)
    path.write_text(json.dumps({k: v for k, v in config.items() if v != "absent"}))


def inputs():
    ids = batch(SHAPE)
    return {"token_ids": ids, "padding_mask": np.ones_like(ids, bool)}


def logits_of(model):
    with torch.no_grad():
        return model(torch.tensor(inputs()["token_ids"])).logits


# ----- Loading


@pytest.mark.parametrize("form", FORMATS)
def test_from_preset_computes_the_logits_of_transformers(theirs, tmp_path, form):
    ours = load(write(theirs, tmp_path, form))
    assert_close(ours(inputs()), logits_of(theirs))


@first_on_tensorflow("stored", ["float16", "bfloat16", "float32"])
@first_on_tensorflow("dtype", ["float32", "bfloat16", "mixed_bfloat16"])
def test_from_preset_casts_weights_to_the_dtype(tmp_path, stored, dtype):
    theirs = in_transformers(SHAPE).to(getattr(torch, stored))
    ours = load(write(theirs, tmp_path), dtype=dtype)
    policy = keras.dtype_policies.get(dtype)
    weight = {w.path: w for w in ours.weights}[
        "transformer_layer_1/self_attention/query/kernel"
    ]
    assert weight.dtype == policy.variable_dtype
    assert ours.backbone.compute_dtype == policy.compute_dtype
    expected = theirs.state_dict()[QUERY].to(getattr(torch, policy.variable_dtype))
    got = keras.ops.convert_to_numpy(keras.ops.cast(weight.value, "float32"))
    np.testing.assert_array_equal(got, expected.float().numpy())


def test_from_preset_loads_a_tied_head_from_the_embedding(tmp_path):
    theirs = in_transformers(SHAPE, tie_word_embeddings=True)
    write(theirs, tmp_path, "safetensors")  # Without the head.
    assert_close(load(tmp_path)(inputs()), logits_of(theirs))
    to_bin(tmp_path, theirs.state_dict())  # With the head, on the same storage.
    assert_close(load(tmp_path)(inputs()), logits_of(theirs))


def test_from_preset_rejects_a_tied_head_that_differs(theirs, tmp_path):
    write(theirs, tmp_path)
    set_config(tmp_path, tie_word_embeddings=True)
    with pytest.raises(ValueError, match=r"lm_head\.weight differs"):
        load(tmp_path)


@pytest.mark.slow_on_tensorflow
def test_from_preset_of_the_backbone_ignores_the_head(theirs, tmp_path, recwarn):
    write(theirs, tmp_path)
    backbone = OpenLlamaBackbone.from_preset(str(tmp_path))
    with torch.no_grad():
        hidden = theirs.model(torch.tensor(inputs()["token_ids"])).last_hidden_state
    assert_close(backbone(inputs()), hidden)
    assert not [w for w in recwarn if "head" in str(w.message)]


@pytest.mark.slow_on_tensorflow
def test_from_preset_loads_a_llama_model_without_head_as_backbone_only(
    theirs, tmp_path
):
    write(theirs.model, tmp_path, "safetensors")
    OpenLlamaBackbone.from_preset(str(tmp_path))
    with pytest.raises(ValueError, match=r"missing: lm_head\.weight"):
        load(tmp_path)


@pytest.mark.slow_on_tensorflow
def test_from_preset_ignores_rotary_frequencies(theirs, tmp_path):
    extra = {
        f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(10)
        for i in range(SHAPE.num_layers)
    }
    write(theirs, tmp_path, "bin", {**theirs.state_dict(), **extra})
    assert_close(load(tmp_path)(inputs()), logits_of(theirs))


def test_from_preset_reads_no_weights_with_load_weights_false(theirs, tmp_path):
    write(theirs, tmp_path)
    (tmp_path / "pytorch_model.bin").unlink()
    model = load(tmp_path, load_weights=False)
    assert model.count_params() == sum(p.numel() for p in theirs.parameters())


@pytest.mark.slow_on_tensorflow
def test_from_preset_prefers_safetensors(theirs, tmp_path):
    write(theirs, tmp_path, "safetensors")
    (tmp_path / "pytorch_model.bin").write_bytes(b"not to be opened")
    assert_close(load(tmp_path)(inputs()), logits_of(theirs))


def test_from_preset_loads_onto_a_device(theirs, tmp_path):
    write(theirs, tmp_path)
    with keras.device("cpu:0"):
        assert_close(load(tmp_path)(inputs()), logits_of(theirs))


# ----- Mismatches


def changed(theirs, **changes):
    state = dict(theirs.state_dict())
    for name, value in changes.items():
        state.pop(name) if value is None else state.update({name: value})
    return state


@pytest.mark.parametrize(
    "changes, message",
    [
        ({NORM: None, QUERY: None}, f"missing: {QUERY}, {NORM}"),
        ({"model.extra.weight": torch.ones(2)}, "unexpected: model.extra.weight"),
        ({"model.layers.0.mlp.up_proj.bias": torch.ones(2)}, "unexpected: model.lay"),
        (
            {NORM: torch.ones(61)},
            rf"wrong shape: {NORM} has \(61,\), expected \(60,\)",
        ),
        (
            {QUERY: torch.ones(60, 120)},
            rf"wrong shape: {QUERY} has \(60, 120\), expected \(120, 60\)",
        ),
    ],
)
@pytest.mark.backend_free
def test_from_preset_lists_tensors_that_do_not_match(
    theirs, tmp_path, changes, message
):
    write(theirs, tmp_path, "bin", changed(theirs, **changes))
    with pytest.raises(ValueError, match=message) as error:
        load(tmp_path)
    assert str(tmp_path) in str(error.value)


@pytest.mark.backend_free
def test_from_preset_lists_all_mismatches_in_one_error(theirs, tmp_path):
    state = changed(theirs, **{NORM: None, "more": torch.ones(1), QUERY: torch.ones(2)})
    write(theirs, tmp_path, "bin", state)
    with pytest.raises(ValueError, match=r"missing: .*unexpected: .*wrong shape: "):
        load(tmp_path)


@pytest.mark.backend_free
def test_from_preset_rejects_another_number_of_layers(theirs, tmp_path):
    write(theirs, tmp_path)
    with pytest.raises(ValueError, match=r"missing: model\.layers\.3\."):
        load(tmp_path, num_layers=4)
    with pytest.raises(ValueError, match=r"unexpected: model\.layers\.2\."):
        load(tmp_path, num_layers=2)


@pytest.mark.backend_free
def test_from_preset_rejects_a_quantized_dtype(theirs, tmp_path):
    write(theirs, tmp_path)
    with pytest.raises(ValueError, match=r"quantization='int8'.*int8_from_float32"):
        load(tmp_path, dtype="int8_from_float32")


@pytest.mark.backend_free
def test_from_preset_rejects_values_beyond_float16(theirs, tmp_path):
    write(theirs, tmp_path, "bin", changed(theirs, **{NORM: torch.full((60,), 1e6)}))
    with pytest.raises(ValueError, match=rf"{NORM} in .*beyond float16's range"):
        load(tmp_path, dtype="float16")


@pytest.mark.backend_free
@pytest.mark.parametrize("form", ["sharded safetensors", "sharded bin"])
def test_from_preset_names_damaged_shards_and_indexes(theirs, tmp_path, form):
    write(theirs, tmp_path, form)
    index = next(tmp_path.glob("*.index.json"))
    content = json.loads(index.read_text())
    names = sorted(set(content["weight_map"].values()))
    assert len(names) > 2
    shard = tmp_path / names[1]

    data = shard.read_bytes()
    shard.write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=rf"{names[1]}.*download it again"):
        load(tmp_path)
    shard.unlink()
    with pytest.raises(OSError, match=f"names the file {names[1]}"):
        load(tmp_path)
    shutil.copy(tmp_path / names[0], shard)
    with pytest.raises(ValueError, match="is in two files"):
        load(tmp_path)
    shard.write_bytes(data)
    load(tmp_path)

    for weight_map, message in (
        ({**content["weight_map"], "more": names[0]}, "files do not contain: more"),
        ({"x": "../other.bin"}, "outside its directory: '../other.bin'"),
        ({"x": 3}, "outside its directory: 3"),
        ([], "cannot be read as the index"),
    ):
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(ValueError, match=message):
            load(tmp_path)
    index.write_text("{")
    with pytest.raises(ValueError, match=rf"{index.name} cannot be read"):
        load(tmp_path)


@pytest.mark.backend_free
def test_from_preset_names_a_directory_without_weights(theirs, tmp_path):
    write(theirs, tmp_path)
    (tmp_path / "pytorch_model.bin").unlink()
    with pytest.raises(
        OSError, match=r"No weights were found.*model\.safetensors.*missing"
    ):
        load(tmp_path)


# ----- config.json

OPENLLAMA_3B = {  # as published: neither rope_theta nor num_key_value_heads
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 3200,
    "intermediate_size": 8640,
    "num_hidden_layers": 26,
    "num_attention_heads": 32,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-06,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "use_cache": True,
}


@pytest.mark.backend_free
def test_backbone_arguments_fills_in_the_defaults_of_transformers():
    from keras_openllama import presets

    arguments = validate_architecture(backbone_arguments(OPENLLAMA_3B))
    assert arguments["rope_max_wavelength"] == 10000.0
    assert arguments["num_key_value_heads"] == 32
    assert arguments["head_dim"] == 100
    assert arguments["rope_scaling"] is None
    preset = presets.registry()["open_llama_3b"].config
    assert arguments == {**preset, "rope_scaling": None}


@pytest.mark.backend_free
@pytest.mark.parametrize(
    "settings, wavelength, scaling",
    [
        ({"rope_theta": 5e5}, 5e5, None),
        ({"rope_scaling": None}, 1e4, None),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0}},
            1e4,
            {"rope_type": "linear", "factor": 2.0},
        ),
        (
            {"rope_theta": 100, "rope_scaling": {"rope_type": "dynamic", "factor": 4}},
            100.0,
            {"rope_type": "dynamic", "factor": 4},
        ),
        ({"rope_parameters": {"rope_theta": 7.0, "rope_type": "default"}}, 7.0, None),
        (
            {
                "rope_parameters": {
                    "rope_theta": 7.0,
                    "rope_type": "linear",
                    "factor": 8.0,
                }
            },
            7.0,
            {"rope_type": "linear", "factor": 8.0},
        ),
    ],
)
def test_backbone_arguments_reads_rope_settings_of_old_and_new_configs(
    settings, wavelength, scaling
):
    arguments = backbone_arguments({**OPENLLAMA_3B, **settings})
    assert arguments["rope_max_wavelength"] == wavelength
    assert arguments["rope_scaling"] == scaling


@pytest.mark.backend_free
@pytest.mark.parametrize(
    "settings, message",
    [
        ({"model_type": "mistral"}, "model_type='mistral'"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"mlp_bias": True}, "mlp_bias=True"),
        ({"quantization_config": {"bits": 4}}, "quantization_config="),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "yarn.*'linear'"),
        ({"rope_parameters": {"rope_type": "llama3"}}, "llama3"),
    ],
)
def test_backbone_arguments_rejects_unsupported_settings(settings, message):
    with pytest.raises(ValueError, match=rf"config\.json sets .*{message}"):
        backbone_arguments({**OPENLLAMA_3B, **settings})


@pytest.mark.backend_free
def test_backbone_arguments_names_missing_settings():
    config = dict(OPENLLAMA_3B)
    del config["vocab_size"], config["hidden_size"]
    with pytest.raises(ValueError, match="does not set vocab_size, hidden_size"):
        backbone_arguments(config)


@pytest.mark.backend_free
def test_from_preset_rejects_an_invalid_config_json(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not valid JSON"):
        load(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="must contain a JSON object"):
        load(tmp_path)
    (tmp_path / "config.json").write_text('{"architecture": "resnet"}')
    with pytest.raises(ValueError, match="neither in KerasHub's"):
        load(tmp_path)


def test_from_preset_loads_rope_scaling_of_old_and_new_configs(tmp_path):
    scaling = {"rope_type": "linear", "factor": 2.0}
    theirs = in_transformers(SHAPE, rope_parameters={"rope_theta": 5000.0, **scaling})
    write(theirs, tmp_path)
    expected = logits_of(theirs)
    assert_close(load(tmp_path)(inputs()), expected)
    set_config(
        tmp_path,
        rope_parameters="absent",
        rope_theta=5000.0,
        rope_scaling={"type": "linear", "factor": 2.0},
    )
    assert_close(load(tmp_path)(inputs()), expected)


def test_weight_specs_have_the_names_of_transformers(theirs):
    from keras_openllama.checkpoints.weight_names import weight_specs

    assert isinstance(theirs, transformers.LlamaForCausalLM)
    rows = weight_specs(SHAPE.num_layers)
    assert {row.transformers for row in rows} == set(theirs.state_dict())
