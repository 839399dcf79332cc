"""Blocks of Q8_0 and Q4_0 are quantized matrices, without rounding."""

import gguf
import numpy as np
import pytest

from keras_openllama.checkpoints.gguf_blocks import (
    MATRIX_FORMATS,
    blocks_from_matrix,
    matrix_from_blocks,
)
from keras_openllama.quantization import quantize_matrix

pytestmark = pytest.mark.backend_free

WEIGHTS = np.random.default_rng(0).normal(size=(5, 96)).astype("float32")


@pytest.mark.parametrize("name", MATRIX_FORMATS)
def test_matrix_from_blocks_is_exact(name):
    kind = gguf.GGMLQuantizationType[name]
    blocks = gguf.quantize(WEIGHTS, kind)
    matrix = matrix_from_blocks(blocks, name)
    assert (matrix.bits, matrix.group_size) == (MATRIX_FORMATS[name].bits, 32)
    assert np.array_equal(matrix.dequantize(), gguf.dequantize(blocks, kind))
    assert np.array_equal(blocks_from_matrix(matrix, name), blocks)


@pytest.mark.parametrize("name", MATRIX_FORMATS)
def test_blocks_from_matrix_has_the_weights_of_the_matrix(name):
    matrix = quantize_matrix(WEIGHTS, MATRIX_FORMATS[name].bits, 32)
    blocks = blocks_from_matrix(matrix, name)
    found = gguf.dequantize(blocks, gguf.GGMLQuantizationType[name])
    assert np.array_equal(found, matrix.dequantize())


@pytest.mark.parametrize(
    "bits, group_size, options",
    [(8, 96, {}), (4, 64, {}), (4, 32, {"symmetric": False})],
)
def test_blocks_from_matrix_returns_none_if_it_would_round(bits, group_size, options):
    matrix = quantize_matrix(WEIGHTS, bits, group_size, **options)
    assert blocks_from_matrix(matrix, f"Q{bits}_0") is None
