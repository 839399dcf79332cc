"""The harness's model takes the arguments of the harness's own model `hf`."""

import inspect

import pytest
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM
from tiny_models import SHAPES, random_lm
from tokenizer_models import trained_model

import keras_openllama.evaluation  # noqa: F401  (It registers the model.)
from keras_openllama.evaluation.hf_arguments import (
    translate_hf_arguments,
    with_hub_prefix,
)
from keras_openllama.evaluation.lm_eval_model import OpenLlamaLM
from keras_openllama.layers.lora import adapted_layers

pytestmark = pytest.mark.backend_free


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "model"
    random_lm(SHAPES[0], trained_model(True)).save_to_preset(path)
    return str(path)


def test_pretrained_and_arguments_without_effect_load_the_model(directory):
    model = get_model("keras_openllama").create_from_arg_string(
        f"pretrained={directory},trust_remote_code=True,device_map=auto,dtype=auto,"
        f"parallelize=False,tokenizer={directory},add_bos_token=False,"
        "attn_implementation=eager,use_fast_tokenizer=False,revision=None",
        {"batch_size": 2, "device": "cpu"},
    )
    assert not model.add_bos
    assert model.lm.backbone.dtype_policy.name == "float32"


def test_pretrained_takes_a_loaded_model(directory):
    lm = random_lm(SHAPES[0], trained_model(True))
    assert OpenLlamaLM(pretrained=lm).lm is lm


def test_peft_loads_adapters(directory, tmp_path):
    lm = random_lm(SHAPES[0], trained_model(True))
    lm.backbone.enable_lora(3)
    lm.save_adapters(tmp_path / "adapters")
    model = OpenLlamaLM(pretrained=directory, peft=str(tmp_path / "adapters"))
    assert {layer.lora_rank for layer in adapted_layers(model.lm)} == {3}


def test_tokenizer_of_another_model_replaces_the_models(directory, tmp_path):
    other = random_lm(SHAPES[0], trained_model(False))
    other.export_to_transformers(tmp_path / "other")
    model = OpenLlamaLM(directory, tokenizer=str(tmp_path / "other"))
    assert not model.lm.preprocessor.tokenizer.keeps_spaces
    with pytest.raises(ValueError, match="3072 pieces but the model has 512"):
        OpenLlamaLM(directory, tokenizer="open_llama_nano")


def test_with_hub_prefix_recognizes_repositories(directory):
    assert with_hub_prefix("openlm-research/open_llama_3b").startswith("hf://")
    for name in (directory, "nano", "open_llama_3b_v2", "hf://user/repo", "a/b/c"):
        assert with_hub_prefix(name) == name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("parallelize=True", r"`parallelize`.*fsdp=4.*parallelize=True"),
        ("device_map=balanced", "`device_map`.*fsdp=4"),
        ("tp_plan=auto", "`tp_plan`.*model=4"),
        ("load_in_8bit=True", "`load_in_8bit`.*dtype=bfloat16.*quantize"),
        ("autogptq=True", "`autogptq`.*dtype=bfloat16"),
        ("delta=some/delta", "`delta`.*Add the delta"),
        ("backend=seq2seq", "`backend`.*causal"),
        ("subfolder=ckpt", "`subfolder`.*Download the folder"),
        ("gguf_file=x.gguf", "`gguf_file`.*as the preset"),
        ("think_end_token=</t>", "`think_end_token`.*Remove it"),
        ("softmax_dtype=float16", "`softmax_dtype`.*float32"),
        ("mixed_precision_dtype=bf16", "dtype=mixed_bfloat16"),
        ("dtype=int7", "`dtype` must be a floating-point .*dtype='int7'"),
        ("dtype=int8", "`dtype` must be a floating-point .*dtype='int8'"),
        ("trust_remote_code=", "`trust_remote_code` must be True or False"),
        ("add_bos=", "`add_bos` must be one of True, False"),
        ("add_bos_token=yes", "`add_bos` must be one of True, False"),
        ("peft=", "`adapters` must be a directory"),
        ("peft=missing", "does not exist, .* adapter_config.json"),
        ("tokenizer=missing", "missing"),
        ("preset=b", "`preset` is given twice.*'b' and 'no preset'"),
        ("max_lenght=5", "no argument 'max_lenght'.*Did you mean 'max_length'"),
        ("apart=no", "no argument 'apart'.*preset, lm, dtype.*trust_remote_code"),
    ],
)
def test_model_names_arguments_that_it_rejects_before_it_loads(arguments, message):
    with pytest.raises((ValueError, OSError), match=message):
        get_model("keras_openllama").create_from_arg_string(
            f"pretrained=no preset,{arguments}"
        )


def test_empty_pretrained_is_named():
    with pytest.raises(ValueError, match="Pass one of `preset`"):
        get_model("keras_openllama").create_from_arg_string("pretrained=")


def test_translate_hf_arguments_knows_all_arguments_of_hf():
    ours = inspect.signature(OpenLlamaLM).parameters
    theirs = inspect.signature(HFLM).parameters.values()
    named = [p for p in theirs if p.kind is not p.VAR_KEYWORD]
    defaults = {p.name: p.default for p in named if p.name not in ours}
    defaults["pretrained"] = "nano"
    assert translate_hf_arguments(defaults, list(ours)) == {"preset": "nano"}
