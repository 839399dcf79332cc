"""Weights are dequantized by the backend as on the host."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_openllama.quantization import quantize_matrix
from keras_openllama.quantization.tensors import dequantize_tensor


@pytest.mark.parametrize("inputs", [32, 45])
@pytest.mark.parametrize("group_size", [16, 64])
@pytest.mark.parametrize(("bits", "symmetric"), [(8, True), (4, True), (4, False)])
def test_dequantize_tensor_equals_quantized_matrix_dequantize(
    bits, symmetric, group_size, inputs
):
    weights = np.random.default_rng(0).normal(0, 0.1, (6, inputs)).astype("float32")
    matrix = quantize_matrix(weights, bits, group_size, symmetric)
    arrays = (matrix.values, matrix.scales, matrix.zeros)
    tensors = [None if a is None else ops.convert_to_tensor(a) for a in arrays]
    options = dict(bits=bits, group_size=matrix.group_size, inputs=inputs)
    found = dequantize_tensor(*tensors, **options, dtype="float32")
    assert (ops.convert_to_numpy(found) == matrix.dequantize()).all()
    rows = [None if t is None else t[None, 2:4] for t in tensors]
    found = dequantize_tensor(*rows, **options, dtype="float32")
    assert (ops.convert_to_numpy(found)[0] == matrix.dequantize()[2:4]).all()


@pytest.mark.skipif(keras.config.backend() != "jax", reason="XLA's memory")
@pytest.mark.parametrize("trains", [False, True])
def test_multiply_quantized_has_one_dequantized_matrix_in_memory(trains):
    import jax

    from keras_openllama.layers.projection import Projection

    layers = [Projection(512, initializer_std=0.02) for _ in range(8)]
    for layer in layers:
        layer.build((None, None, 512))
        layer.quantize("int4")

    def loss(x, values):
        mapping = zip([v for la in layers for v in la.variables], values, strict=True)
        with keras.StatelessScope(state_mapping=mapping):
            for layer in layers:
                x = jax.numpy.tanh(layer(x))
        return x.sum()

    values = [v.value for layer in layers for v in layer.variables]
    program = jax.jit(jax.grad(loss) if trains else loss)
    compiled = program.lower(jax.numpy.ones((1, 4, 512)), values).compile()
    size = compiled.memory_analysis().temp_size_in_bytes
    assert size < 4 * 512 * 512 * 4  # Of eight matrices.
