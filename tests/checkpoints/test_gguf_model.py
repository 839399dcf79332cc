"""`export_to_gguf` writes what llama.cpp reads, and `from_preset` reads it back."""

import dataclasses
import json
import os
import warnings

import gguf
import keras
import numpy as np
import pytest
from gguf_files import changed_copy, half_split, interleaved, read_file
from tensorflow_marks import first_on_tensorflow
from tiny_models import TinyShape, assert_close, batch, random_lm, right_padding
from tokenizer_models import trained_model

from keras_openllama import (
    OpenLlamaBackbone,
    OpenLlamaCausalLM,
    OpenLlamaCausalLMPreprocessor,
    OpenLlamaTokenizer,
)
from keras_openllama.__main__ import main
from keras_openllama.checkpoints import weight_names
from keras_openllama.checkpoints.contents import contents_of_model
from keras_openllama.checkpoints.formats import GGUF_QUANTIZATIONS
from keras_openllama.checkpoints.gguf_model import backbone_arguments, output_files
from keras_openllama.convert import convert
from keras_openllama.quantization import WeightQuantizationConfig

# Grouped heads of 100, whose rows of 400 do not divide into blocks of 32; and heads
# whose rows do.
ODD = TinyShape("odd", 4, 2, 100, hidden_dim=64, num_layers=2, context=64)
EVEN = TinyShape("even", 4, 2, 16, hidden_dim=64, num_layers=2, context=64)
TYPES = gguf.GGMLQuantizationType


def model(shape=EVEN, proto=None, **options):
    # The vocabulary of 199 is odd on purpose; rows are what matters.
    return random_lm(shape, proto, **options)


def export(lm, path, *args, **options):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Blocks of .* do not divide")
        lm.export_to_gguf(path, *args, **options)
    return path


@pytest.fixture(scope="module")
def lm():
    return model()


@pytest.fixture(scope="module")
def written(lm, tmp_path_factory):
    """The path of the model in float32, for tests that change the file."""
    return export(lm, tmp_path_factory.mktemp("gguf") / "model.gguf", "f32")


def values_by_path(lm):
    return {weight.path: keras.ops.convert_to_numpy(weight) for weight in lm.weights}


def expected_type(name, shape, quantization):
    """The type of a tensor, written out independently of the package."""
    if len(shape) == 1:
        return "F32"
    if quantization in ("f32", "f16", "bf16"):
        return quantization.upper()
    if shape[-1] % 32:
        return "F16"
    if name in ("token_embd.weight", "output.weight"):
        return "Q8_0"
    return quantization.upper()


def logits(lm, ids):
    inputs = {
        "token_ids": ids,
        "padding_mask": right_padding([ids.shape[1]] * len(ids), ids.shape[1]),
    }
    return keras.ops.convert_to_numpy(lm(inputs))


@first_on_tensorflow("quantization", GGUF_QUANTIZATIONS)
@first_on_tensorflow("shape", [ODD, EVEN], ids=str)
def test_export_to_gguf_writes_what_the_gguf_package_reads(
    shape, quantization, tmp_path
):
    lm = model(shape)
    _, tensors = read_file(export(lm, tmp_path / "x.gguf", quantization))
    heads = {"query": shape.num_query_heads, "key": shape.num_key_value_heads}
    values = values_by_path(lm)
    specs = weight_names.weight_specs(shape.num_layers)
    assert [spec.gguf for spec in specs] == list(tensors)
    for spec in specs:
        array, module = values[spec.path], spec.path.split("/")[-2]
        if module in heads:
            array = interleaved(array, heads[module])
        data, kind = tensors[spec.gguf]
        assert kind.name == expected_type(spec.gguf, array.shape, quantization)
        assert np.array_equal(data, gguf.quantize(array, kind)), spec.gguf


@first_on_tensorflow("quantization", GGUF_QUANTIZATIONS)
@first_on_tensorflow("shape", [ODD, EVEN], ids=str)
def test_from_preset_has_the_logits_of_the_dequantized_weights(
    shape, quantization, tmp_path
):
    lm = model(shape)
    path = export(lm, tmp_path / "x.gguf", quantization)
    loaded = OpenLlamaCausalLM.from_preset(path, preprocessor=None)
    heads = {"query": shape.num_query_heads, "key": shape.num_key_value_heads}
    _, tensors = read_file(path)
    for spec in weight_names.weight_specs(shape.num_layers):
        array = gguf.dequantize(*tensors[spec.gguf])
        module = spec.path.split("/")[-2]
        if module in heads:
            array = half_split(array, heads[module])
        next(w for w in lm.weights if w.path == spec.path).assign(array)
    ids = batch(shape)
    assert_close(logits(loaded, ids), logits(lm, ids))


@pytest.mark.backend_free
def test_export_to_gguf_names_tensors_that_are_stored_in_a_larger_type(tmp_path):
    message = r"Blocks of Q4_0 have 32 values.*F16: blk\.0\.attn_output\.weight, blk\.1"
    with pytest.warns(UserWarning, match=message):
        model(ODD).export_to_gguf(tmp_path / "x.gguf", "q4_0")


@pytest.mark.backend_free
def test_from_preset_reads_k_quants(written, tmp_path):
    lm = model(TinyShape("wide", 4, 4, 64, hidden_dim=256, intermediate_dim=256))
    path = export(lm, tmp_path / "f32.gguf", "f32")
    kind = TYPES.Q6_K
    rows = np.random.default_rng(0).integers(0, 0x18, (256, 210), "uint8")
    changed = changed_copy(
        path, tmp_path / "q6_k.gguf", tensors={"blk.0.ffn_gate.weight": (rows, kind)}
    )
    loaded = OpenLlamaCausalLM.from_preset(changed, preprocessor=None)
    found = values_by_path(loaded)["transformer_layer_0/feedforward/gate/kernel"]
    assert np.array_equal(found, gguf.dequantize(rows, kind))


@pytest.mark.backend_free
def test_from_preset_ties_the_head_if_the_file_has_none(written, lm, tmp_path):
    path = changed_copy(written, tmp_path / "x.gguf", tensors={"output.weight": None})
    loaded = values_by_path(OpenLlamaCausalLM.from_preset(path, preprocessor=None))
    expected = values_by_path(lm)["token_embedding/embeddings"]
    assert np.array_equal(loaded["token_embedding/embeddings"], expected)
    assert np.array_equal(loaded["lm_head/kernel"], expected)


@pytest.mark.backend_free
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rope_scaling": {"rope_type": "linear", "factor": 2.5}},
        {"rope_max_wavelength": 500000.0, "layer_norm_epsilon": 1e-5},
    ],
)
def test_from_preset_restores_the_architecture(options, tmp_path):
    lm = model(EVEN, **options)
    path = export(lm, tmp_path / "x.gguf")
    backbone = OpenLlamaBackbone.from_preset(path, load_weights=False)
    expected = {**lm.backbone.architecture(), "initializer_std": 0.02}
    assert backbone.architecture() == expected


@pytest.mark.backend_free
def test_export_to_gguf_warns_of_dynamic_rope_scaling(tmp_path):
    lm = model(EVEN, rope_scaling={"rope_type": "dynamic", "factor": 2.0})
    with pytest.warns(UserWarning, match="no dynamic RoPE scaling.* 64 tokens"):
        lm.export_to_gguf(tmp_path / "x.gguf")
    backbone = OpenLlamaBackbone.from_preset(tmp_path / "x.gguf", load_weights=False)
    assert backbone.architecture()["rope_scaling"] is None
    assert backbone.architecture()["max_sequence_length"] == 64


@pytest.mark.backend_free
def test_from_preset_reads_the_factors_of_rope(written, tmp_path):
    factors = np.full(8, 4, "float32")
    path = tmp_path / "x.gguf"
    changed_copy(written, path, tensors={"rope_freqs.weight": factors})
    backbone = OpenLlamaBackbone.from_preset(path)
    assert backbone.architecture()["rope_scaling"] == {
        "rope_type": "linear",
        "factor": 4.0,
    }
    factors[3] = 2
    changed_copy(written, path, tensors={"rope_freqs.weight": factors})
    with pytest.raises(ValueError, match=r"x\.gguf has the tensor rope_freqs\.weight"):
        OpenLlamaBackbone.from_preset(path)


@pytest.mark.backend_free
def test_from_preset_loads_each_class(tmp_path):
    lm = model(EVEN, trained_model(True))
    path = export(lm, tmp_path / "no_suffix")
    text = "The import  statement"
    loaded = OpenLlamaCausalLM.from_preset(str(path))
    assert loaded.loaded_from == "the file no_suffix"
    assert loaded.generate(text, max_new_tokens=6) == lm.generate(
        text, max_new_tokens=6
    )
    assert OpenLlamaTokenizer.from_preset(path)(text) == lm.preprocessor.tokenizer(text)
    preprocessor = OpenLlamaCausalLMPreprocessor.from_preset(path)
    assert preprocessor.sequence_length == 64
    backbone = OpenLlamaBackbone.from_preset(path, dtype="bfloat16")
    assert backbone.token_embedding.embeddings.dtype == "bfloat16"


# ----- Metadata


@pytest.mark.backend_free
def test_export_to_gguf_writes_the_metadata_of_llama_cpp(tmp_path):
    lm = model(ODD, layer_norm_epsilon=1e-5)
    metadata, _ = read_file(export(lm, tmp_path / "my_model.gguf", "q8_0"))
    prefix = "tokenizer."
    assert {k: v for k, v in metadata.items() if not k.startswith(prefix)} == {
        "general.architecture": "llama",
        "general.type": "model",
        "general.name": "my_model",
        "general.size_label": "216K",
        "general.file_type": gguf.LlamaFileType.MOSTLY_Q8_0,
        "general.quantization_version": 2,
        "llama.vocab_size": 199,
        "llama.block_count": 2,
        "llama.context_length": 64,
        "llama.embedding_length": 64,
        "llama.feed_forward_length": 96,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 100,
        "llama.attention.value_length": 100,
        "llama.attention.layer_norm_rms_epsilon": pytest.approx(1e-5),
        "llama.rope.dimension_count": 100,
        "llama.rope.freq_base": 10000.0,
    }


@pytest.mark.backend_free
def test_output_files_names_preset_license_and_source(lm, tmp_path):
    contents = dataclasses.replace(contents_of_model(lm), origin="open_llama_3b_v2")
    (output,) = output_files(contents, "f32", "x")
    with open(tmp_path / "x.gguf", "wb") as file:
        output.write(file, (contents.tensors[path].array() for path in output.tensors))
    assert os.path.getsize(tmp_path / "x.gguf") == output.size
    metadata, _ = read_file(tmp_path / "x.gguf")
    url = "https://huggingface.co/openlm-research/open_llama_3b_v2"
    assert metadata["general.name"] == "open_llama_3b_v2"
    assert metadata["general.license"] == "apache-2.0"
    assert metadata["general.source.url"] == url
    assert metadata["general.base_model.0.repo_url"] == url
    assert metadata["general.base_model.0.organization"] == "openlm-research"


# ----- Conversion


@pytest.mark.backend_free
def test_convert_from_and_to_gguf_is_exact(lm, written, tmp_path):
    convert(written, tmp_path / "hf", "transformers", tokenizer=False)
    convert(
        tmp_path / "hf",
        tmp_path / "x.gguf",
        "gguf",
        quantization="f32",
        tokenizer=False,
    )
    back = read_file(tmp_path / "x.gguf")[1]
    for name, (data, kind) in read_file(written)[1].items():
        assert back[name][1] == kind
        assert np.array_equal(back[name][0], data), name


@pytest.mark.backend_free
def test_convert_command_writes_gguf(tmp_path, capsys):
    target = tmp_path / "nano.gguf"
    arguments = ["convert", "nano", str(target), "--to", "gguf"]
    assert not main([*arguments, "--quantization", "q4_0", "--dry-run"])
    size = int(capsys.readouterr().out.split()[0].replace(",", ""))
    assert not target.exists()
    assert not main([*arguments, "--quantization", "q4_0"])
    assert os.path.getsize(target) == size
    metadata, tensors = read_file(target)
    assert metadata["general.name"] == "open_llama_nano"
    assert tensors["blk.3.attn_q.weight"][1] == TYPES.Q4_0
    assert not main(
        ["generate", "The sea", "--preset", str(target), "--max-new-tokens=4"]
    )
    assert "sea" in capsys.readouterr().out
    hf = tmp_path / "hf"
    assert not main(["convert", str(target), str(hf), "--to", "transformers"])
    assert json.loads((hf / "config.json").read_text())["dtype"] == "float32"


@pytest.mark.backend_free
def test_convert_rejects_options_that_do_not_apply_to_gguf(written, tmp_path):
    target = tmp_path / "x.gguf"
    with pytest.raises(ValueError, match="`quantization`, such as 'f16', and not"):
        convert(written, target, "gguf", dtype="float16")
    with pytest.raises(ValueError, match="applies to the formats gguf and keras"):
        convert(written, target, "easylm", quantization="q8_0")
    with pytest.raises(ValueError, match=r"'q4_k_m'.*llama-quantize"):
        convert(written, target, "gguf", quantization="q4_k_m")
    with pytest.raises(ValueError, match="only to EasyLM files"):
        convert(written, target, "gguf", preset="nano")
    with pytest.raises(FileExistsError):
        convert(written, written, "gguf")
    assert not target.exists()


# ----- Errors


@pytest.mark.backend_free
@pytest.mark.parametrize("quantization", ["f16", "q8_0"])
def test_export_to_gguf_names_a_tensor_with_values_out_of_range(quantization, tmp_path):
    lm = model()
    kernel = lm.backbone.transformer_layers[1].feedforward.gate.kernel
    kernel.assign(kernel + 1e5)
    message = f"{kernel.path}: it has values beyond float16.*quantization='bf16'"
    with pytest.raises(ValueError, match=message):
        lm.export_to_gguf(tmp_path / "x.gguf", quantization)
    kernel.assign(kernel * float("nan"))
    if quantization == "q8_0":
        with pytest.raises(ValueError, match=f"{kernel.path}: it has NaN .* Q8_0"):
            lm.export_to_gguf(tmp_path / "x.gguf", quantization)
    assert not os.listdir(tmp_path)


def assert_not_loaded(path, message):
    with pytest.raises(ValueError, match=rf"x\.gguf.*{message}"):
        OpenLlamaCausalLM.from_preset(path, preprocessor=None)


@pytest.mark.backend_free
def test_from_preset_rejects_another_architecture(written, tmp_path):
    path = tmp_path / "x.gguf"
    changed_copy(written, path, architecture="gemma")
    assert_not_loaded(path, "has the architecture 'gemma'. Only .*'llama'")


@pytest.mark.backend_free
@pytest.mark.parametrize(
    "key, value, message",
    [
        ("llama.block_count", None, "has no llama.block_count"),
        ("llama.expert_count", 8, "sets llama.expert_count=8"),
        ("general.type", "adapter", "sets general.type='adapter'"),
        ("llama.rope.scaling.type", "yarn", "sets llama.rope.scaling.type='yarn'"),
        ("llama.rope.dimension_count", 8, "rope.dimension_count=8.*heads of one size"),
        ("llama.attention.head_count_kv", [2, 4], r"head_count_kv=\[2, 4\]"),
        ("llama.feed_forward_length", 128, "ffn_gate.weight has .*expected"),
        ("llama.block_count", 3, "missing: blk.2.attn_norm.weight"),
        ("llama.block_count", 1, "unexpected: blk.1.attn_norm.weight"),
    ],
)
def test_from_preset_names_metadata_that_it_does_not_support(
    key, value, message, written, tmp_path
):
    path = changed_copy(written, tmp_path / "x.gguf", metadata={key: value})
    assert_not_loaded(path, message)


@pytest.mark.backend_free
def test_from_preset_names_unexpected_tensors(written, tmp_path):
    bias = {"blk.0.attn_q.bias": np.ones(64, "float32")}
    path = changed_copy(written, tmp_path / "x.gguf", tensors=bias)
    assert_not_loaded(path, "unexpected: blk.0.attn_q.bias.*metadata of the file")


@pytest.mark.backend_free
def test_backbone_arguments_accepts_the_same_value_for_each_layer(written, tmp_path):
    from keras_openllama.checkpoints.files.gguf_file import read_gguf

    metadata = {"llama.attention.head_count_kv": [2, 2]}
    path = changed_copy(written, tmp_path / "x.gguf", metadata=metadata)
    assert backbone_arguments(read_gguf(path))["num_key_value_heads"] == 2


@pytest.mark.backend_free
def test_from_preset_names_the_files_of_a_directory_with_gguf_only(written, tmp_path):
    (tmp_path / "model").mkdir()
    changed_copy(written, tmp_path / "model" / "a.gguf")
    with pytest.raises(FileNotFoundError, match=r"has GGUF files: a\.gguf\. Name one"):
        OpenLlamaCausalLM.from_preset(tmp_path / "model")
    with pytest.raises(FileNotFoundError, match=r"no GGUF file missing\.gguf"):
        OpenLlamaCausalLM.from_preset("missing.gguf")


# ----- Types that stay as they are


@pytest.mark.backend_free
@pytest.mark.parametrize("quantization", ["q8_0", "q4_0"])
@pytest.mark.parametrize("shape", [ODD, EVEN], ids=str)
def test_convert_copies_quantized_weights_bit_by_bit(shape, quantization, tmp_path):
    # Rounding again would change the scales of Q4_0, and of rows in float16.
    first = export(model(shape), tmp_path / "first.gguf", quantization)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Blocks of .* do not divide")
        convert(
            *(first, tmp_path / "second.gguf", "gguf"),
            quantization=quantization,
            tokenizer=False,
        )
    expected, found = read_file(first)[1], read_file(tmp_path / "second.gguf")[1]
    for name, (data, kind) in expected.items():
        assert found[name][1] == kind
        assert found[name][0].tobytes() == data.tobytes(), name


def quantized_layers(lm):
    """The projections of the first decoder layer, the embedding and the head."""
    layer = lm.backbone.transformer_layers[0]
    return {
        "blk.0.attn_q.weight": layer.self_attention.query,
        "blk.0.attn_k.weight": layer.self_attention.key,
        "blk.0.ffn_down.weight": layer.feedforward.down,
        "token_embd.weight": lm.backbone.token_embedding,
        "output.weight": lm.lm_head,
    }


HEADS = {"blk.0.attn_q.weight": 4, "blk.0.attn_k.weight": 2}


def dequantized(tensors, name):
    array = gguf.dequantize(*tensors[name])
    return half_split(array, HEADS[name]) if name in HEADS else array


@first_on_tensorflow("quantization, bits", [("q8_0", 8), ("q4_0", 4)])
def test_from_preset_keeps_quantized_weights_as_they_are(quantization, bits, tmp_path):
    path = export(model(), tmp_path / "x.gguf", quantization)
    loaded = OpenLlamaCausalLM.from_preset(path, preprocessor=None)
    _, tensors = read_file(path)
    for name, layer in quantized_layers(loaded).items():
        matrix = layer.quantized_matrix()
        assert matrix.bits == (bits if name.startswith("blk") else 8)
        assert matrix.group_size == 32
        assert np.array_equal(matrix.dequantize(), dequantized(tensors, name)), name
    export(loaded, tmp_path / "y.gguf", quantization)
    found = read_file(tmp_path / "y.gguf")[1]
    for name, (data, _) in tensors.items():
        assert found[name][0].tobytes() == data.tobytes(), name


@pytest.mark.backend_free
def test_from_preset_without_quantization_dequantizes(tmp_path):
    path = export(model(), tmp_path / "x.gguf", "q4_0")
    loaded = OpenLlamaCausalLM.from_preset(path, preprocessor=None, quantization=None)
    _, tensors = read_file(path)
    kernel = loaded.backbone.transformer_layers[0].self_attention.query.kernel
    expected = dequantized(tensors, "blk.0.attn_q.weight")
    assert np.array_equal(keras.ops.convert_to_numpy(kernel), expected)


@pytest.mark.parametrize("mode, quantization", [("int8", "q8_0"), ("int4", "q4_0")])
@pytest.mark.slow_on_tensorflow
def test_export_to_gguf_does_not_round_a_quantized_model(mode, quantization, tmp_path):
    lm = model()
    config = WeightQuantizationConfig(bits=int(mode[3:]), group_size=32)
    lm.quantize(config=config)
    _, tensors = read_file(export(lm, tmp_path / "x.gguf", quantization))
    for name, layer in quantized_layers(lm).items():
        expected = layer.quantized_matrix()
        if expected.group_size == 32:  # Not the embedding and head of int4.
            assert np.array_equal(expected.dequantize(), dequantized(tensors, name))


@pytest.mark.slow_on_tensorflow
def test_export_to_gguf_merges_adapters_into_quantized_weights(tmp_path):
    lm = model()
    lm.quantize(config=WeightQuantizationConfig(bits=8, group_size=32))
    lm.backbone.enable_lora(2)
    query = lm.backbone.transformer_layers[0].self_attention.query
    for adapter in (query.lora_kernel_a, query.lora_kernel_b):
        adapter.assign(np.ones(adapter.shape))
    _, tensors = read_file(export(lm, tmp_path / "x.gguf", "f32"))
    found = dequantized(tensors, "blk.0.attn_q.weight")
    assert np.allclose(found, query.merged_kernel())
    assert not np.allclose(found, query.quantized_matrix().dequantize())
