"""Weights and adapters load by names that wrappers of the model have changed."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import TinyShape, batch, in_transformers, random_lm

from keras_openllama import OpenLlamaBackbone, OpenLlamaCausalLM
from keras_openllama.checkpoints.wrapped_names import unwrap_names

pytestmark = [pytest.mark.backend_free, pytest.mark.usefixtures("compile_fast")]

SHAPE = TinyShape("grouped", 6, 2, 20, hidden_dim=60, context=64)
WRAPPERS = {
    "torch.compile": lambda name: f"_orig_mod.{name}",
    "data parallel": lambda name: f"module.{name}",
    "both": lambda name: f"_orig_mod.module.{name}",
    "FSDP": lambda name: (
        "_fsdp_wrapped_module."
        + name.replace("self_attn", "_fsdp_wrapped_module.self_attn")
    ),
    "activation checkpointing": lambda name: name.replace(
        "mlp.", "_checkpoint_wrapped_module.mlp."
    ),
    "PEFT": lambda name: f"base_model.model.{name}",
    "PEFT, compiled": lambda name: f"_orig_mod.base_model.model.{name}",
    "Lightning": lambda name: f"model.{name}",
    "Lightning Fabric": lambda name: f"_forward_module.student.{name}",
}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A directory in transformers format."""
    directory = tmp_path_factory.mktemp("exported")
    in_transformers(SHAPE).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def tensors(exported):
    return load_file(exported / "model.safetensors")


def write(tensors, exported, directory, form):
    (directory / "config.json").write_bytes((exported / "config.json").read_bytes())
    if form == "bin":
        torch.save(tensors, directory / "pytorch_model.bin")
    elif form == "safetensors":
        save_file(tensors, directory / "model.safetensors")
    else:
        weight_map = {}
        for number, (name, tensor) in enumerate(tensors.items()):
            weight_map[name] = f"model-{number}.safetensors"
            save_file({name: tensor}, directory / weight_map[name])
        index = directory / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": weight_map}))


def load(directory):
    return OpenLlamaCausalLM.from_preset(directory, preprocessor=None)


def assert_same_weights(found, expected):
    for one, other in zip(found.weights, expected.weights, strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other), one.path)


@pytest.mark.parametrize("form", ["safetensors", "bin", "shards"])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_from_preset_removes_wrappers_from_names_and_warns_once(
    wrapper, form, exported, tensors, tmp_path, recwarn
):
    wrapped = {WRAPPERS[wrapper](name): t for name, t in tensors.items()}
    write(wrapped, exported, tmp_path, form)
    lm = load(tmp_path)
    (warning,) = [w for w in recwarn if "of wrappers of the model" in str(w.message)]
    assert str(tmp_path) in str(warning.message)
    assert_same_weights(lm, load(exported))


def test_from_preset_loads_a_wrapped_llama_model_without_head(
    exported, tensors, tmp_path
):
    wrapped = {
        "module." + name.removeprefix("model."): tensor
        for name, tensor in tensors.items()
        if name != "lm_head.weight"
    }
    write(wrapped, exported, tmp_path, "safetensors")
    with pytest.warns(UserWarning, match=r"contain 'module\.' of wrappers"):
        backbone = OpenLlamaBackbone.from_preset(tmp_path)
    assert_same_weights(backbone, OpenLlamaBackbone.from_preset(exported))


def test_from_preset_of_unwrapped_names_does_not_warn(exported, recwarn):
    load(exported)
    assert not [w for w in recwarn if "wrappers" in str(w.message)]


def test_from_preset_rejects_two_tensors_of_one_name(exported, tensors, tmp_path):
    twice = {**tensors, "_orig_mod.model.norm.weight": torch.ones(60)}
    write(twice, exported, tmp_path, "safetensors")
    with pytest.raises(ValueError, match=r"several tensors for model\.norm\.weight"):
        load(tmp_path)


def test_from_preset_rejects_adapters_among_the_weights(exported, tensors, tmp_path):
    query = "base_model.model.model.layers.0.self_attn.q_proj"
    state = {f"base_model.model.{name}": tensor for name, tensor in tensors.items()}
    state[f"{query}.base_layer.weight"] = state.pop(f"{query}.weight")
    state[f"{query}.lora_A.default.weight"] = torch.ones(2, 60)
    write(state, exported, tmp_path, "bin")
    with (
        pytest.warns(UserWarning, match="wrappers"),
        pytest.raises(ValueError, match=r"lora_A.weight. Merge them with PEFT"),
    ):
        load(tmp_path)


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_from_preset_names_the_cause_of_empty_tensors(
    form, exported, tensors, tmp_path
):
    empty = {
        name: torch.empty(0) if "mlp" in name else t for name, t in tensors.items()
    }
    write(empty, exported, tmp_path, form)
    message = r"has empty tensors: model\.layers.*ZeRO-3.*stage3_gather.*zero_to_fp32"
    with pytest.raises(ValueError, match=message):
        load(tmp_path)


def test_from_preset_names_the_cause_of_flattened_tensors(exported, tmp_path):
    flat = {"_fsdp_wrapped_module._flat_param": torch.ones(9)}
    write(flat, exported, tmp_path, "bin")
    with pytest.raises(ValueError, match=r"FSDP: .*_flat_param.*FULL_STATE_DICT"):
        load(tmp_path)


def test_unwrap_names_keeps_names_with_different_prefixes():
    tensors = {"student.norm": 1, "teacher.norm": 2}
    assert unwrap_names(tensors, {"norm"}, "a file") == tensors


# ----- Adapters


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """A model with random adapters, and the directory that it saved."""
    lm = random_lm(SHAPE)
    lm.backbone.enable_lora(2, ["query", "down"], alpha=6)
    random = np.random.default_rng(0)
    for weight in lm.trainable_variables:
        weight.assign(random.standard_normal(weight.shape))
    directory = tmp_path_factory.mktemp("saved") / "adapters"
    lm.save_adapters(directory)
    return lm, directory


def write_adapters(saved, directory, form, rename=lambda name: name, **settings):
    config = json.loads((saved / "adapter_config.json").read_text())
    config = {**config, **settings}
    config = {k: v for k, v in config.items() if v != "absent"}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    tensors = load_file(saved / "adapter_model.safetensors")
    tensors = {rename(name): tensor for name, tensor in tensors.items()}
    if form == "bin":
        torch.save(tensors, directory / "adapter_model.bin")
    else:
        save_file(tensors, directory / "adapter_model.safetensors")
    return directory


ADAPTER_NAMES = {
    "_orig_mod.": lambda name: f"_orig_mod.{name}",
    "module.": lambda name: f"module.{name}",
    "_fsdp_wrapped_module.": lambda name: name.replace(
        "layers.0", "layers.0._fsdp_wrapped_module"
    ),
    "default.": lambda name: name.replace(".weight", ".default.weight"),
    "my_adapter.": lambda name: name.replace(".weight", ".my_adapter.weight"),
    "base_model.model.": lambda name: f"base_model.model.{name}",
}


@pytest.mark.parametrize("form", ["safetensors", "bin"])
@pytest.mark.parametrize("part", ADAPTER_NAMES)
def test_load_adapters_removes_wrappers_from_names_and_warns_once(
    part, form, adapters, tmp_path, recwarn
):
    expected, saved = adapters
    write_adapters(saved, tmp_path, form, ADAPTER_NAMES[part])
    lm = random_lm(SHAPE)
    lm.load_adapters(tmp_path)
    (warning,) = [w for w in recwarn if "of wrappers of the model" in str(w.message)]
    assert repr(part) in str(warning.message)
    assert_same_weights(lm, expected)


@pytest.mark.parametrize("form", ["safetensors", "bin"])
@pytest.mark.parametrize("prefix", ["base_model.model.", ""])
def test_load_adapters_reads_both_formats_without_a_warning(
    prefix, form, adapters, tmp_path, recwarn
):
    expected, saved = adapters

    def rename(name):
        return prefix + name.removeprefix("base_model.model.")

    write_adapters(saved, tmp_path, form, rename)
    lm = random_lm(SHAPE)
    lm.load_adapters(tmp_path)
    assert not [w for w in recwarn if "wrappers" in str(w.message)]
    assert_same_weights(lm, expected)


def test_load_adapters_executes_nothing_in_a_bin_file(adapters, tmp_path):
    _, saved = adapters

    class Exploit:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))

    write_adapters(saved, tmp_path, "bin")
    torch.save({"x": Exploit()}, tmp_path / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"adapter_model\.bin was rejected as unsafe"):
        random_lm(SHAPE).load_adapters(tmp_path)
    assert not (tmp_path / "executed").exists()


def test_load_adapters_names_both_files_if_there_is_none(adapters, tmp_path):
    _, saved = adapters
    write_adapters(saved, tmp_path, "bin")
    (tmp_path / "adapter_model.bin").unlink()
    with pytest.raises(OSError, match=r"adapter_model\.safetensors.*adapter_model\.bi"):
        random_lm(SHAPE).load_adapters(tmp_path)


def test_load_adapters_rejects_several_adapters_in_one_file(adapters, tmp_path):
    _, saved = adapters
    write_adapters(saved, tmp_path, "bin")
    tensors = torch.load(tmp_path / "adapter_model.bin")
    both = {
        name.replace(".weight", f".{adapter}.weight"): tensor
        for name, tensor in tensors.items()
        for adapter in ("default", "other")
    }
    torch.save(both, tmp_path / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"several tensors for .* or one adapter"):
        random_lm(SHAPE).load_adapters(tmp_path)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.empty(0), "has empty tensors: .*ZeRO-3"),
        (torch.ones(2, 60, dtype=torch.int32), "not floating point"),
    ],
)
def test_load_adapters_rejects_tensors_without_values(
    tensor, message, adapters, tmp_path
):
    _, saved = adapters
    write_adapters(saved, tmp_path, "bin")
    tensors = torch.load(tmp_path / "adapter_model.bin")
    tensors[next(name for name in tensors if "q_proj.lora_A" in name)] = tensor
    torch.save(tensors, tmp_path / "adapter_model.bin")
    lm = random_lm(SHAPE)
    with pytest.raises(ValueError, match=message):
        lm.load_adapters(tmp_path)
    assert len(lm.trainable_variables) == len(lm.weights)


def alpha_of(lm):
    return lm.backbone.transformer_layers[0].self_attention.query.lora_alpha


def test_load_adapters_uses_the_defaults_of_peft_for_absent_settings(
    adapters, tmp_path
):
    _, saved = adapters
    lm = random_lm(SHAPE)
    lm.load_adapters(write_adapters(saved, tmp_path, "bin", lora_alpha="absent"))
    assert alpha_of(lm) == 8
    write_adapters(saved, tmp_path, "bin", r="absent")
    with pytest.raises(ValueError, match="for r=8"):
        random_lm(SHAPE).load_adapters(tmp_path)


def test_load_adapters_scales_by_the_square_root_of_the_rank_for_rslora(
    adapters, tmp_path
):
    peft = pytest.importorskip("peft")
    import transformers

    expected, saved = adapters
    write_adapters(saved, tmp_path, "safetensors", use_rslora=True)
    base = random_lm(SHAPE)
    base.export_to_transformers(tmp_path / "base", tokenizer=False)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path)
    base.load_adapters(tmp_path)
    assert alpha_of(base) == pytest.approx(6 * 2**0.5)
    with torch.no_grad():
        logits = theirs(torch.from_numpy(batch(SHAPE)).long()).logits.numpy()
    found = np.asarray(base.score(batch(SHAPE)))
    assert np.abs(found - logits).max() <= 1e-5 * np.abs(logits).max()
    assert np.abs(found - np.asarray(expected.score(batch(SHAPE)))).max() > 0.1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(lora_alpha="16"), "`lora_alpha` must be .*lora_alpha='16'"),
        (dict(use_rslora="false"), "`use_rslora` must be true or false"),
        (dict(lora_alpha=[16]), r"`lora_alpha` must be .*lora_alpha=\[16\]"),
        (dict(lora_alpha=True), "`lora_alpha` must be .*lora_alpha=True"),
        (dict(lora_alpha=float("nan")), "`lora_alpha` must be .*lora_alpha=nan"),
        (dict(lora_alpha=0), "`lora_alpha` must be .*lora_alpha=0"),
        (dict(r="2"), "`r` must be a positive integer.*r='2'"),
        (dict(r=2.0), "`r` must be a positive integer.*r=2.0"),
        (dict(r=0), "`r` must be a positive integer.*r=0"),
        (dict(peft_type=None), "peft_type=None"),
        (dict(peft_type=["LORA"]), r"peft_type=\['LORA'\]"),
        (dict(bias=""), "bias=''"),
        (dict(bias=["none"]), "bias="),
        (dict(use_dora="false"), "use_dora='false'"),
        (dict(init_lora_weights={}), "init_lora_weights={}"),
    ],
)
def test_load_adapters_names_settings_of_a_wrong_type(
    settings, message, adapters, tmp_path
):
    _, saved = adapters
    write_adapters(saved, tmp_path, "safetensors", **settings)
    lm = random_lm(SHAPE)
    with pytest.raises(ValueError, match=message) as error:
        lm.load_adapters(tmp_path)
    assert "adapter_config.json" in str(error.value)
    assert len(lm.trainable_variables) == len(lm.weights)


def test_from_preset_of_adapters_says_how_to_load_them(adapters):
    _, saved = adapters
    with pytest.raises(OSError, match=r"has LoRA adapters.*`lm\.load_adapters`"):
        OpenLlamaCausalLM.from_preset(saved)
