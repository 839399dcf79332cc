"""`convert` reads and writes quantized models in Keras's format."""

import h5py
import numpy as np
import pytest
from tiny_models import SHAPES, random_lm

from keras_openllama import OpenLlamaCausalLM
from keras_openllama.convert import convert
from keras_openllama.layers.quantizable import is_quantized
from keras_openllama.quantization import WeightQuantizationConfig

pytestmark = pytest.mark.backend_free

GROUPS = WeightQuantizationConfig(4, 32, embedding_bits=None)
ZEROS = WeightQuantizationConfig(4, 16, symmetric=False, head_bits=None)


def arrays_of(lm):
    """The values, scales and zeros of quantized layers, and the other weights."""
    return {
        weight.path: np.asarray(weight.value)
        for weight in lm.weights
        if "seed_generator" not in weight.path
    }


def load(path, **options):
    return OpenLlamaCausalLM.from_preset(str(path), preprocessor=None, **options)


def assert_same(lm, other):
    found, expected = arrays_of(lm), arrays_of(other)
    assert found.keys() == expected.keys()
    for path, array in expected.items():
        assert found[path].dtype == array.dtype, path
        assert np.array_equal(found[path], array), path


@pytest.mark.parametrize("shape", [SHAPES[1], SHAPES[2]], ids=str)
@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_convert_to_keras_quantizes_as_quantize_does(mode, shape, tmp_path):
    lm = random_lm(shape)
    lm.export_to_transformers(tmp_path / "floats")
    convert(
        *(tmp_path / "floats", tmp_path / "out", "keras"),
        quantization=mode,
        tokenizer=False,
    )
    lm.quantize(mode)
    assert_same(load(tmp_path / "out"), lm)


@pytest.mark.parametrize("config", [GROUPS, ZEROS], ids=["groups", "zeros"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_convert_dequantizes_for_transformers_as_the_export_does(
    config, dtype, tmp_path
):
    lm = random_lm(SHAPES[2], dtype=dtype)
    lm.quantize(config=config)
    lm.save_to_preset(tmp_path / "quantized")
    for to in ("transformers", "keras"):
        convert(tmp_path / "quantized", tmp_path / to, to, tokenizer=False)
    assert_same(load(tmp_path / "keras", dtype=dtype), lm)
    lm.export_to_transformers(tmp_path / "exported")
    files = [
        tmp_path / name / "model.safetensors" for name in ("exported", "transformers")
    ]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize("bits, quantization", [(8, "q8_0"), (4, "q4_0")])
def test_convert_keeps_groups_of_32_between_keras_and_gguf(
    bits, quantization, tmp_path
):
    lm = random_lm(SHAPES[2])
    config = WeightQuantizationConfig(bits, 32, embedding_bits=None, head_bits=None)
    lm.quantize(config=config)
    lm.save_to_preset(tmp_path / "quantized")
    gguf_file = tmp_path / "x.gguf"
    convert(
        *(tmp_path / "quantized", gguf_file, "gguf"),
        quantization=quantization,
        tokenizer=False,
    )
    convert(gguf_file, tmp_path / "back", "keras", tokenizer=False)
    back = load(tmp_path / "back")
    found, expected = arrays_of(back), arrays_of(lm)
    for layer in lm.backbone.transformer_layers:
        for projection in (layer.self_attention.query, layer.feedforward.down):
            for variable in projection.quantized_variables():
                path = variable.path
                assert np.array_equal(found[path], expected[path]), path
    assert is_quantized(back.lm_head)  # GGUF stores it in Q8_0.


def test_convert_says_how_to_convert_models_that_version_0_2_quantized(tmp_path):
    lm = random_lm(SHAPES[2])
    lm.quantize("int8")
    lm.save_to_preset(tmp_path / "quantized")
    with h5py.File(tmp_path / "quantized" / "model.weights.h5", "r+") as file:
        scales = "layers/embedding/vars/1"
        values = file[scales][()].astype("float32").reshape(-1)
        del file[scales]  # Keras has one axis of float32.
        file[scales] = values
    with pytest.raises(ValueError, match=r"token_embedding.*`save_to_preset`"):
        convert(
            *(tmp_path / "quantized", tmp_path / "out", "transformers"),
            tokenizer=False,
        )
    assert not (tmp_path / "out").exists()
