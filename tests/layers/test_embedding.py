"""The embedding of tokens, quantized."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_openllama.layers.embedding import Embedding
from keras_openllama.quantization import WeightQuantizationConfig

CONFIGS = [
    WeightQuantizationConfig(8),
    WeightQuantizationConfig(8, group_size=8),
    WeightQuantizationConfig(4, group_size=16, embedding_bits=4),
    WeightQuantizationConfig(4, 8, symmetric=False, embedding_bits=4),
]
IDS = np.array([[0, 29, 3], [3, 3, 7]])


def quantized(config, dtype="float32", rank=0):
    layer = Embedding(30, 20, dtype=dtype)
    layer.build()
    if rank:
        layer.enable_lora(rank, b_initializer="normal")
    layer.quantize(config=config)
    return layer


@pytest.mark.parametrize("config", CONFIGS)
def test_embedding_looks_up_rows_of_its_quantized_matrix(config):
    layer = quantized(config)
    expected = layer.quantized_matrix().dequantize()[IDS]
    assert (ops.convert_to_numpy(layer(IDS)) == expected).all()
    found = ops.convert_to_numpy(layer(IDS.astype("float32")))
    assert (found == expected).all()


@pytest.mark.parametrize("config", CONFIGS)
def test_embedding_is_restored_from_its_config_and_variables(config):
    layer = quantized(config, dtype="mixed_bfloat16")
    store = {}
    layer.save_own_variables(store)
    copy = Embedding.from_config(layer.get_config())
    copy.build()
    copy.load_own_variables({k: ops.convert_to_numpy(v) for k, v in store.items()})
    for found, expected in zip(copy.variables, layer.variables, strict=True):
        assert (found.path, found.dtype) == (expected.path, expected.dtype)
        np.testing.assert_array_equal(found.numpy(), expected.numpy())


def test_embedding_merges_adapters_when_it_is_saved():
    layer = quantized(CONFIGS[0], rank=2)
    expected = ops.convert_to_numpy(layer(IDS))
    store = {}
    layer.save_own_variables(store)
    copy = quantized(CONFIGS[0])
    copy.load_own_variables({k: ops.convert_to_numpy(v) for k, v in store.items()})
    np.testing.assert_allclose(ops.convert_to_numpy(copy(IDS)), expected, atol=1e-3)


def test_enable_lora_of_a_quantized_embedding_names_the_order():
    with pytest.raises(ValueError, match="`enable_lora` before `quantize`"):
        quantized(CONFIGS[0]).enable_lora(2)


def test_embedding_stays_float_without_bits():
    layer = quantized(WeightQuantizationConfig(4, embedding_bits=None))
    assert layer.quantization_mode is None and layer.quantized_matrix() is None
    assert isinstance(layer, keras.layers.Embedding)
