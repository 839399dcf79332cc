"""Quantized matrices in the format of ONNX Runtime's `MatMulNBits`.

It has groups of 16 to 256 inputs, a power of two. Larger groups are several of those
with the same scale, and missing inputs of the last group are zero. Several matrices of
the same inputs are the rows of one.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from keras_openllama.quantization.quantized_matrix import (
    NIBBLE_ZERO,
    QuantizedMatrix,
    pack_nibbles,
)

MIN_GROUP, MAX_GROUP = 16, 256
# The inputs that the compiled products round with one scale and sum in integers.
TILED_GROUP = 32
# Heuristic: the groups that one large group is divided into. Each has a scale and a sum
# of its own in memory: smaller groups are slower to read, and larger ones round
# activations more coarsely (`benchmarks/README.md`).
PREFERRED_GROUP = 128


def runtime_group_size(matrix: QuantizedMatrix) -> int | None:
    """Returns the size of the groups that a matrix has in ONNX Runtime.

    Args:
        matrix: the matrix.

    Returns:
        A power of two that divides the groups of the matrix; `None` if there is none.

    Example:
        >>> from keras_openllama.quantization.rounding import quantize_matrix
        >>> matrix = quantize_matrix(np.ones((2, 100), "float32"), 4, group_size=64)
        >>> runtime_group_size(matrix)
        64
    """
    if matrix.groups == 1:
        return PREFERRED_GROUP
    divisor = matrix.group_size & -matrix.group_size  # The largest power of two.
    return min(divisor, MAX_GROUP) if divisor >= MIN_GROUP else None


def can_be_joined(matrices: Sequence[QuantizedMatrix]) -> bool:
    """Returns whether matrices can be the rows of one.

    Args:
        matrices: matrices of the same inputs.
    """
    return (
        len(
            {
                (matrix.bits, runtime_group_size(matrix), matrix.zeros is None)
                for matrix in matrices
            }
        )
        == 1
    )


class JoinedMatrix:
    """Matrices that `MatMulNBits` multiplies as one.

    Args:
        matrices: `QuantizedMatrix` objects for which `can_be_joined` holds.
        rows: int array, which outputs of all matrices the joined one has, and -1 for an
            output that is zero; `None` for all.

    Attributes:
        bits: bits of a weight.
        group_size: size of the groups.
        shape: `(outputs, inputs)` of the joined matrix.
        has_zeros: whether there are zero points.
        has_one_scale: whether all groups of an output have the same scale.

    Raises:
        ValueError: if ONNX Runtime does not support the groups.
    """

    def __init__(
        self, matrices: Sequence[QuantizedMatrix], rows: np.ndarray | None = None
    ) -> None:
        first = matrices[0]
        self._matrices, self._rows = matrices, rows
        self.bits = first.bits
        self.group_size = runtime_group_size(first)
        if self.group_size is None:
            raise ValueError(
                f"ONNX Runtime needs groups of a multiple of {MIN_GROUP} inputs. "
                "Quantize the model with another group size. Received: "
                f"group_size={first.group_size}"
            )
        self._outputs = sum(len(matrix.values) for matrix in matrices)
        self.shape = (self._outputs if rows is None else len(rows), first.inputs)
        self.has_zeros = first.zeros is not None
        self.has_one_scale = all(matrix.groups == 1 for matrix in matrices)

    @property
    def can_be_tiled(self) -> bool:
        """Whether the compiled products support it.

        It has no zero points, and groups of a multiple of 32 inputs.
        """
        groups = {matrix.groups == 1 for matrix in self._matrices}
        sizes = [matrix.group_size for matrix in self._matrices]
        return not self.has_zeros and (
            groups == {True}
            or (groups == {False} and all(size % TILED_GROUP == 0 for size in sizes))
        )

    @property
    def values_shape(self) -> tuple[int, int, int]:
        """Shape of `values`: outputs, groups, bytes of a group."""
        return self.shape[0], self._groups, self.group_size * self.bits // 8

    @property
    def scales_shape(self) -> tuple[int, int]:
        """Shape of `scales`."""
        return self.shape[0], self._groups

    @property
    def zeros_shape(self) -> tuple[int, int]:
        """Shape of `zeros`."""
        return self.shape[0], (self._groups + 1) // 2

    @property
    def _groups(self):
        return -(-self.shape[1] // self.group_size)

    def values(self) -> np.ndarray:
        """Returns the values, uint8, in groups of whole bytes; 128 or 8 is zero."""
        zero = 128 if self.bits == 8 else NIBBLE_ZERO * 17  # In both nibbles.
        width = self._groups * self.group_size * self.bits // 8
        joined = np.full((self._outputs, width), zero, "uint8")
        for rows, matrix in self._parts():
            values = matrix.values
            if self.bits == 8:
                values = values.view("uint8") ^ np.uint8(128)
            joined[rows, : values.shape[1]] = values
        return self._select(joined, zero).reshape(self.values_shape)

    def scales(self, dtype: str = "float32") -> np.ndarray:
        """Returns the scales of the groups, by default in float32."""
        scales = [matrix.scales for matrix in self._matrices]
        return self._select(self._by_group(scales, dtype), 0)

    def zeros(self) -> np.ndarray:
        """Returns the zero points of the groups, packed as the values are."""
        zeros = [matrix.zeros for matrix in self._matrices]
        return pack_nibbles(self._select(self._by_group(zeros, "uint8"), NIBBLE_ZERO))

    def _by_group(self, arrays, dtype):
        joined = np.empty((self._outputs, self._groups), dtype)
        for (rows, matrix), array in zip(self._parts(), arrays, strict=True):
            if matrix.groups > 1:
                repeats = matrix.group_size // self.group_size
                array = np.repeat(array, repeats, axis=1)[:, : self._groups]
            joined[rows] = array
        return joined

    def _select(self, joined, zero):
        """The rows of the joined matrix."""
        if self._rows is None:
            return joined
        selected = joined[self._rows]
        selected[self._rows < 0] = zero
        return selected

    def _parts(self):
        """Yields where the outputs of each matrix are, and the matrix."""
        start = 0
        for matrix in self._matrices:
            stop = start + len(matrix.values)
            yield slice(start, stop), matrix
            start = stop
