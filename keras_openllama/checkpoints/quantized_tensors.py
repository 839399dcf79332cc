"""Quantized matrices in files, which need not be dequantized to be copied."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from keras_openllama.quantization.policies import MatrixFormat
from keras_openllama.quantization.quantized_matrix import QuantizedMatrix
from keras_openllama.quantization.rounding import quantize_matrix

if TYPE_CHECKING:
    from keras_openllama.checkpoints.tensors import ReadableTensor, StoredTensor


class MatrixTensor:
    """A `tensors.QuantizedTensor`: its values, scales and zeros are arrays of a file.

    Args:
        parts: The values, the scales and, with zero points, these.
        shape: Shape `(outputs, inputs)` of the matrix.
        dtype: Name of the dtype of the layer's computations.
        chosen: The format.
    """

    def __init__(
        self,
        parts: list[StoredTensor],
        shape: tuple[int, int],
        dtype: str,
        chosen: MatrixFormat,
    ):
        first = parts[0]
        self.name, self.offset, self.file = first.name, first.offset, first.file
        self.nbytes = sum(part.nbytes for part in parts)
        self.shape, self.dtype, self.format = shape, dtype, chosen
        self._parts = parts

    def quantized_matrix(self) -> QuantizedMatrix:
        """Returns the matrix, whose arrays share the memory of the file."""
        inputs = self.shape[1]
        group_size = self.format.group_size_of(inputs)
        arrays = [part.array() for part in self._parts]
        return QuantizedMatrix(self.format.bits, group_size, inputs, *arrays)

    def array(self) -> np.ndarray:
        """Returns the weights, in float32."""
        return self.quantized_matrix().dequantize()

    def prefetch(self) -> None:
        """Reads the arrays into memory."""
        for part in self._parts:
            part.prefetch()

    def release(self) -> None:
        """Releases the memory of the arrays."""
        for part in self._parts:
            part.release()


def value_as_it_is(tensor: ReadableTensor) -> np.ndarray | QuantizedMatrix:
    """Returns the quantized matrix of a tensor that has one, or its array."""
    quantized = getattr(tensor, "quantized_matrix", None)
    matrix = quantized() if quantized else None
    return tensor.array() if matrix is None else matrix


def arrays_in_format(
    value: np.ndarray | QuantizedMatrix, chosen: MatrixFormat | None
) -> list[np.ndarray]:
    """Returns a weight as a layer stores it, which rounds it if it has another format.

    Args:
        value: What `value_as_it_is` returned.
        chosen: The format of the layer; `None` if it is not quantized.

    Returns:
        The values, the scales and, with zero points, these; or the weights.

    Example:
        >>> arrays = arrays_in_format(np.ones((2, 64), "float32"), MatrixFormat(4, 32))
        >>> [array.shape for array in arrays]
        [(2, 32), (2, 2)]
    """
    is_matrix = isinstance(value, QuantizedMatrix)
    if is_matrix and chosen is not None and _has_format(value, chosen):
        matrix = value
    else:
        weights = value.dequantize() if is_matrix else value
        if chosen is None:
            return [weights]
        group_size = chosen.group_size_of(weights.shape[1])
        matrix = quantize_matrix(weights, chosen.bits, group_size, chosen.symmetric)
    arrays = (matrix.values, matrix.scales, matrix.zeros)
    return [array for array in arrays if array is not None]


def _has_format(matrix, chosen):
    group_size = chosen.group_size_of(matrix.inputs)
    found = (matrix.bits, matrix.group_size, matrix.zeros is None)
    return found == (chosen.bits, group_size, chosen.symmetric)
