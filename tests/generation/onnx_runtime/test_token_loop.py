"""Generation of quantized models on a CPU with ONNX Runtime."""

import errno

import keras
import native_products
import numpy as np
import pytest
import tiny_models
from keras.quantizers import Int4QuantizationConfig
from tensorflow_marks import first_on_tensorflow

from keras_openllama import OpenLlamaCausalLM
from keras_openllama.generation import generate
from keras_openllama.generation.onnx_runtime import decoder as decoder_module
from keras_openllama.generation.onnx_runtime import file as onnx_file
from keras_openllama.generation.onnx_runtime import graph as onnx_graph
from keras_openllama.generation.onnx_runtime import token_loop
from keras_openllama.generation.onnx_runtime.decoder import OnnxCache, OnnxDecoder
from keras_openllama.generation.onnx_runtime.token_loop import (
    OnnxTokenLoop,
    uses_onnx_runtime,
)

LENGTHS = (3, 12, 1, 7)
not_on_tensorflow = pytest.mark.skipif(
    keras.config.backend() == "tensorflow", reason="TensorFlow copies the weights"
)


@pytest.fixture
def exact_activations(monkeypatch):
    """Without rounding of activations, which costs speed."""
    monkeypatch.setattr(onnx_graph, "ACTIVATION_ACCURACY", 1)
    monkeypatch.setattr(decoder_module, "native_library", lambda: None)


def quantized(shape, mode="int4", config=None, filters=None, **options):
    lm = tiny_models.random_lm(shape, **options)
    lm.quantize(mode, config=config, filters=filters)
    return lm


def prompts(shape, lengths=LENGTHS):
    ids = tiny_models.batch(shape, len(lengths), max(lengths))
    return [row[:length] for row, length in zip(ids.tolist(), lengths, strict=True)]


def decoded_and_expected(lm, shape, steps=4):
    """Logits after prompts of different lengths, and those of the layers of Keras."""
    rows, found = prompts(shape), []
    cache = OnnxCache(OnnxDecoder(lm), len(rows), columns=20)
    cache.prefill([np.array(row[:-1], "int64") for row in rows])
    for step in range(steps):
        found.append(cache.step(np.array([row[-1] for row in rows])).copy())
        for row in rows:
            row.append(7 + step)
    lengths = [len(row) for row in rows]
    mask = tiny_models.right_padding(lengths, max(lengths))
    ids = np.array([row + [0] * (max(lengths) - len(row)) for row in rows])
    logits = lm.predict({"token_ids": ids, "padding_mask": mask}, verbose=0)
    ends = np.array(lengths)[:, None] - np.arange(steps + 1, 1, -1)
    expected = np.take_along_axis(logits, ends[:, :, None], axis=1)
    return np.stack(found, axis=1), expected.astype("float32")


def assert_equals_keras(lm, shape):
    found, expected = decoded_and_expected(lm, shape)
    assert np.abs(found - expected).max() < 2e-5 * np.abs(expected).max()


@first_on_tensorflow("shape", tiny_models.SHAPES, ids=str)
def test_onnx_decoder_equals_keras(shape, exact_activations):
    assert_equals_keras(quantized(shape), shape)


@pytest.mark.parametrize("shape", tiny_models.SHAPES[:2], ids=str)
@pytest.mark.parametrize("mode", ["int8", "int4"])
@pytest.mark.slow_on_tensorflow
def test_onnx_decoder_with_rounded_activations_is_close_to_keras(shape, mode):
    found, expected = decoded_and_expected(quantized(shape, mode), shape)
    error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    assert 1e-4 < error < 0.03


@native_products.needs_them
@pytest.mark.parametrize("shape", tiny_models.SHAPES, ids=str)
@not_on_tensorflow
def test_onnx_decoder_in_bfloat16_is_close_to_keras(shape):
    lm = tiny_models.random_lm(shape, dtype="bfloat16")
    assert uses_onnx_runtime(lm)
    found, expected = decoded_and_expected(lm, shape)
    error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    assert 1e-4 < error < 0.02


@native_products.needs_them
@not_on_tensorflow
def test_onnx_decoder_in_bfloat16_follows_changed_weights():
    shape = tiny_models.SHAPES[1]
    lm = tiny_models.random_lm(shape, dtype="bfloat16")
    loop = lm.make_generate_function()
    (before,) = loop.generate(prompts(shape), [6] * 4, [])
    lm.lm_head.kernel.assign(-1 * lm.lm_head.kernel)
    (after,) = loop.generate(prompts(shape), [6] * 4, [])
    assert before != after
    (expected,) = OnnxTokenLoop(lm).generate(prompts(shape), [6] * 4, [])
    assert after == expected


@native_products.needs_them
@not_on_tensorflow
def test_two_loops_on_a_model_in_bfloat16_share_its_weights():
    shape = tiny_models.SHAPES[0]
    lm = tiny_models.random_lm(shape, dtype="bfloat16")
    loops = OnnxTokenLoop(lm), OnnxTokenLoop(lm)
    decoders = [loop.decoder() for loop in loops * 2]
    decoders = [loop.decoder() for loop in loops * 2]
    assert decoders[:2] == decoders[2:]
    addresses = [x.ctypes.data for x in decoders[0]._arrays.values()]
    assert addresses == [x.ctypes.data for x in decoders[1]._arrays.values()]


@native_products.needs_them
@not_on_tensorflow
def test_changed_adapters_do_not_move_a_model_in_bfloat16():
    lm = tiny_models.random_lm(tiny_models.SHAPES[0], dtype="bfloat16")
    lm.backbone.enable_lora(2)
    loop = OnnxTokenLoop(lm)
    first = loop.decoder()
    lm.trainable_variables[0].assign(lm.trainable_variables[0] + 1)
    second = loop.decoder()
    assert first is not second
    kernel = "layer.0.down.weights.0"
    assert first._arrays[kernel].ctypes.data == second._arrays[kernel].ctypes.data


def test_fit_releases_the_model_in_onnx_runtime():
    lm = quantized(tiny_models.SHAPES[0])
    lm.backbone.enable_lora(2)
    loop = lm.make_generate_function()
    loop.decoder()
    lm.compile(optimizer="sgd", sampler="greedy")
    lm.generate_function = loop
    ids = tiny_models.batch(tiny_models.SHAPES[0], 2, 8)
    lm.fit({"token_ids": ids, "padding_mask": np.ones_like(ids)}, ids, verbose=0)
    assert loop._decoder is None


def test_onnx_decoder_of_a_partly_quantized_model_in_bfloat16():
    shape = tiny_models.SHAPES[0]
    lm = quantized(shape, "int8", filters="query|up", dtype="bfloat16")
    found, expected = decoded_and_expected(lm, shape)
    assert np.linalg.norm(found - expected) < 0.03 * np.linalg.norm(expected)


@not_on_tensorflow
def test_models_in_float8_do_not_use_onnx_runtime():
    lm = tiny_models.random_lm(tiny_models.SHAPES[0], dtype="bfloat16")
    lm.quantize("float8")
    assert not uses_onnx_runtime(lm)


@not_on_tensorflow
@pytest.mark.parametrize("dtype", ["float32", "mixed_bfloat16", "float16"])
def test_models_in_other_dtypes_do_not_use_onnx_runtime(dtype):
    assert not uses_onnx_runtime(
        tiny_models.random_lm(tiny_models.SHAPES[0], dtype=dtype)
    )


@native_products.needs_them
@not_on_tensorflow
def test_models_in_bfloat16_with_named_adapters_do_not_use_onnx_runtime():
    lm = tiny_models.random_lm(tiny_models.SHAPES[0], dtype="bfloat16")
    assert not uses_onnx_runtime(lm, named_adapters=True)


@pytest.mark.parametrize("filters", [r"query|up", r"layer.*gate|value|embedding"])
@pytest.mark.slow_on_tensorflow
def test_onnx_decoder_of_a_partly_quantized_model(filters, exact_activations):
    shape = tiny_models.SHAPES[0]
    lm = quantized(shape, filters=filters)
    assert uses_onnx_runtime(lm)
    assert_equals_keras(lm, shape)


@pytest.mark.parametrize("shape", tiny_models.SHAPES[:2], ids=str)
@pytest.mark.slow_on_tensorflow
def test_onnx_decoder_with_adapters(shape, exact_activations):
    lm = quantized(shape)
    lm.backbone.enable_lora(2, ["query", "key", "down"], alpha=3)
    for variable in lm.trainable_variables:
        variable.assign(keras.random.normal(variable.shape, stddev=0.2, seed=1))
    assert_equals_keras(lm, shape)


@pytest.mark.slow_on_tensorflow
def test_onnx_decoder_scales_positions_linearly(exact_activations):
    shape = tiny_models.SHAPES[0]
    scaling = {"rope_type": "linear", "factor": 4.0}
    assert_equals_keras(quantized(shape, rope_scaling=scaling), shape)


def test_onnx_cache_prefills_several_long_prompts(monkeypatch):
    monkeypatch.setattr("keras_openllama.generation.onnx_runtime.decoder.CHUNK", 4)
    shape = tiny_models.SHAPES[0]
    loop = OnnxTokenLoop(quantized(shape))
    for lengths in ((9, 9, 2, 2, 2, 1, 1), (4, 4), (3, 3, 3)):
        rows = prompts(shape, lengths)
        (together,) = loop.generate(rows, [3] * len(rows), [])
        alone = [next(loop.generate([row], [3], []))[0] for row in rows]
        assert together == alone


@pytest.mark.slow_on_tensorflow
def test_onnx_decoder_prefills_in_chunks(exact_activations, monkeypatch):
    monkeypatch.setattr("keras_openllama.generation.onnx_runtime.decoder.CHUNK", 4)
    shape = tiny_models.SHAPES[0]
    assert_equals_keras(quantized(shape), shape)


def test_generate_of_a_quantized_model_uses_onnx_runtime(exact_activations):
    shape = tiny_models.SHAPES[0]
    lm = quantized(shape)
    loop = lm.make_generate_function()
    assert isinstance(loop, OnnxTokenLoop)
    limits = [9, 4, 0, 6]
    (found,) = loop.generate(prompts(shape), limits, [5, 7])
    (expected,) = generate.TokenLoop(lm).generate(prompts(shape), limits, [5, 7])
    assert found == expected


@pytest.mark.slow_on_tensorflow
def test_stream_of_a_quantized_model_equals_generate():
    lm = OpenLlamaCausalLM.from_preset("open_llama_nano")
    lm.quantize("int4")
    pieces = list(lm.stream("The sea", max_new_tokens=8))
    assert "The sea" + "".join(pieces) == lm.generate("The sea", max_new_tokens=8)


@pytest.mark.parametrize("sampler", ["top_p", "top_k", "random"])
@pytest.mark.slow_on_tensorflow
def test_generate_of_a_quantized_model_samples(sampler):
    lm = quantized(tiny_models.SHAPES[0])
    lm.compile(sampler=sampler)
    inputs = {"token_ids": np.ones((2, 3), "int32")}
    inputs["padding_mask"] = np.ones_like(inputs["token_ids"])
    first, second = (
        lm.generate(inputs, max_new_tokens=20, stop_token_ids=None)["token_ids"]
        for _ in range(2)
    )
    assert first.shape == (2, 23)
    assert (first != second).any()  # The random state advances.


@pytest.mark.slow_on_tensorflow
def test_generate_of_a_quantized_model_warns_that_beam_search_is_slow():
    lm = quantized(tiny_models.SHAPES[0])
    lm.compile(sampler="beam")
    with pytest.warns(UserWarning, match="search run on the backend"):
        loop = lm.make_generate_function()
    assert not isinstance(loop, OnnxTokenLoop)


def test_generate_notices_new_values_of_adapters():
    shape = tiny_models.SHAPES[0]
    lm = quantized(shape, mode="int8")
    lm.backbone.enable_lora(2, ["query", "up"])
    loop = lm.make_generate_function()
    first = loop.decoder()
    assert loop.decoder() is first
    for variable in lm.trainable_variables:
        variable.assign(keras.random.normal(variable.shape, stddev=1, seed=1))
    assert loop.decoder() is not first


@first_on_tensorflow(
    "options, config, reason",
    [
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, None, "RoPE"),
        ({}, Int4QuantizationConfig(block_size=12), "multiple of 16"),
    ],
)
def test_generate_without_onnx_runtime_warns(options, config, reason):
    shape = tiny_models.SHAPES[0]
    lm = quantized(shape, None if config else "int4", config, **options)
    with pytest.warns(UserWarning, match=reason):
        loop = lm.make_generate_function()
    assert not isinstance(loop, OnnxTokenLoop)
    (new,) = loop.generate([[1, 5]], [3], [])
    assert len(new[0]) == 3


@pytest.mark.slow_on_tensorflow
def test_generate_with_int8_cache_without_compiled_attention_warns(monkeypatch):
    monkeypatch.setattr(token_loop, "native_library", lambda: None)
    lm = quantized(tiny_models.SHAPES[0])
    lm.compile(kv_cache_dtype="int8")
    with pytest.warns(UserWarning, match="kv_cache_dtype='int8'"):
        assert not isinstance(lm.make_generate_function(), OnnxTokenLoop)


@native_products.needs_them
@first_on_tensorflow("shape", tiny_models.SHAPES, ids=str)
def test_onnx_decoder_with_int8_cache_is_close_to_keras(shape):
    lm = quantized(shape, "int8")
    lm.compile(kv_cache_dtype="int8")
    assert isinstance(lm.make_generate_function(), OnnxTokenLoop)
    found, expected = decoded_and_expected(lm, shape)
    error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    assert 1e-4 < error < 0.03


def test_uses_onnx_runtime_for_quantized_models_only():
    assert not uses_onnx_runtime(tiny_models.random_lm(tiny_models.SHAPES[0]))


def test_onnx_decoder_names_the_directory_without_space(monkeypatch):
    def no_space(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    lm = quantized(tiny_models.SHAPES[0])
    monkeypatch.setattr(onnx_file, "progress_bar", no_space)
    with pytest.raises(OSError, match="TMPDIR"):
        OnnxDecoder(lm)
