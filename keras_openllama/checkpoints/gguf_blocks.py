"""Converts between blocks of GGUF and quantized matrices, without rounding.

A block of Q8_0 or Q4_0 has a float16 scale and 32 values. In Q4_0, byte `i` of a block
has value `i` in its low and value `i + 16` in its high nibble.

Source: `ggml/src/ggml-common.h` of https://github.com/ggml-org/llama.cpp.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from keras_openllama.quantization.policies import MatrixFormat
from keras_openllama.quantization.quantized_matrix import (
    QuantizedMatrix,
    pack_nibbles,
    unpack_nibbles,
)

_VALUES = 32  # Of a block.
_SCALE_BYTES = 2
# The types that layers can have as they are.
MATRIX_FORMATS = {"Q8_0": MatrixFormat(8, _VALUES), "Q4_0": MatrixFormat(4, _VALUES)}


def matrix_from_blocks(blocks: NDArray, type_name: str) -> QuantizedMatrix:
    """Converts blocks to a quantized matrix.

    Args:
        blocks: uint8 array of shape `(outputs, bytes per output)`.
        type_name: `"Q8_0"` or `"Q4_0"`.

    Returns:
        The matrix, with copies of the values.

    Example:
        >>> import gguf
        >>> weights = np.arange(64, dtype="float32").reshape(2, 32)
        >>> blocks = gguf.quantize(weights, gguf.GGMLQuantizationType.Q8_0)
        >>> matrix = matrix_from_blocks(blocks, "Q8_0")
        >>> matrix.values[0, :4].tolist()
        [0, 4, 8, 12]
    """
    bits, rows = MATRIX_FORMATS[type_name].bits, len(blocks)
    stored = blocks.reshape(rows, -1, _SCALE_BYTES + _VALUES * bits // 8)
    inputs = stored.shape[1] * _VALUES
    scales = np.ascontiguousarray(stored[..., :_SCALE_BYTES])
    values = np.ascontiguousarray(stored[..., _SCALE_BYTES:])
    if bits == 8:
        values = values.view(np.int8).reshape(rows, inputs)
    else:
        nibbles = np.concatenate([values & 0x0F, values >> 4], axis=-1)
        values = pack_nibbles(nibbles.reshape(rows, inputs))
    scales = scales.view(np.float16).reshape(rows, -1)
    return QuantizedMatrix(bits, _VALUES, inputs, values, scales)


def blocks_from_matrix(matrix: QuantizedMatrix, type_name: str) -> NDArray | None:
    """Converts a quantized matrix to blocks, the inverse of `matrix_from_blocks`.

    Args:
        matrix: The matrix.
        type_name: Name of a type.

    Returns:
        uint8 array of shape `(outputs, bytes per output)`. `None` if the type would
        need to round the matrix.

    Example:
        >>> from keras_openllama.quantization import quantize_matrix
        >>> matrix = quantize_matrix(np.ones((2, 32), "float32"), 8, 32)
        >>> blocks_from_matrix(matrix, "Q8_0").shape
        (2, 34)
        >>> blocks_from_matrix(matrix, "Q4_0") is None
        True
    """
    chosen = MATRIX_FORMATS.get(type_name)
    is_same = (
        chosen is not None
        and matrix.zeros is None
        and (matrix.bits, matrix.group_size) == (chosen.bits, chosen.group_size)
        and matrix.inputs % _VALUES == 0
    )
    if not is_same:
        return None
    rows, groups = matrix.scales.shape
    if matrix.bits == 8:
        values = np.ascontiguousarray(matrix.values).view(np.uint8)
        values = values.reshape(rows, groups, _VALUES)
    else:
        nibbles = unpack_nibbles(matrix.values, matrix.inputs)
        halves = nibbles.reshape(rows, groups, 2, _VALUES // 2)
        values = halves[:, :, 0] | halves[:, :, 1] << 4
    scales = np.ascontiguousarray(matrix.scales).view(np.uint8)
    scales = scales.reshape(rows, groups, _SCALE_BYTES)
    return np.concatenate([scales, values], axis=-1).reshape(rows, -1)
