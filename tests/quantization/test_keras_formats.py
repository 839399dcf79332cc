"""Weights in Keras's own formats are read as Keras computes with them."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_openllama.quantization.keras_formats import (
    dequantize_embeddings,
    dequantize_kernel,
    is_keras_format,
    stored_arrays,
)

SHAPE = (10, 13)
INT4 = {
    "int4 by groups": keras.quantizers.Int4QuantizationConfig(block_size=4),
    "int4 by channels": keras.quantizers.Int4QuantizationConfig(block_size=None),
}
CONFIGS = {
    # Inputs that Keras would round to int8 stay as they are.
    "int8": keras.quantizers.Int8QuantizationConfig(activation_quantizer=None),
    **INT4,
}


def saved(layer):
    store = {}
    layer.save_own_variables(store)
    return stored_arrays({k: ops.convert_to_numpy(v) for k, v in store.items()})


@pytest.mark.parametrize("kind", CONFIGS)
def test_dequantize_kernel_returns_the_weights_of_keras_einsum_dense(kind):
    layer = keras.layers.EinsumDense("bti,oi->bto", (None, SHAPE[0]))
    layer.build((None, None, SHAPE[1]))
    layer.quantize(config=CONFIGS[kind])
    arrays = saved(layer)
    assert is_keras_format(arrays, SHAPE[0])
    expected = ops.convert_to_numpy(layer(np.eye(SHAPE[1], dtype="float32")[None]))[0].T
    np.testing.assert_allclose(dequantize_kernel(arrays, SHAPE), expected, atol=1e-5)


@pytest.mark.parametrize("kind", CONFIGS)
def test_dequantize_embeddings_returns_the_weights_of_keras_embedding(kind):
    layer = keras.layers.Embedding(*SHAPE)
    layer.build()
    layer.quantize(config=CONFIGS[kind])
    arrays = saved(layer)
    assert is_keras_format(arrays, SHAPE[0])
    expected = ops.convert_to_numpy(layer(np.arange(SHAPE[0])))
    np.testing.assert_allclose(
        dequantize_embeddings(arrays, SHAPE), expected, atol=1e-5
    )
