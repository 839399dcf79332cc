"""A matrix of weights with 8 or 4 bits each, on the host."""

from __future__ import annotations

import dataclasses
import math
from typing import TypeAlias

import numpy as np

# The nibble that stands for zero in a symmetric matrix of 4 bits.
NIBBLE_ZERO = 8
# Rows are converted in blocks of about this many weights, to bound the memory.
_BLOCK = 1 << 22

DType: TypeAlias = np.dtype | type | str


@dataclasses.dataclass(frozen=True, eq=False)
class QuantizedMatrix:
    """A matrix `(outputs, inputs)` whose weights are `(values - zeros) * scales`.

    Each group of adjacent inputs of an output has a scale, and a zero point if the
    matrix is not symmetric. If the group size does not divide the inputs, the last
    group of each output is shorter.

    With 4 bits, byte `i` of an output contains the values of input `2 * i` in its low
    and of input `2 * i + 1` in its high nibble. A nibble is the value plus 8. So the
    bytes of a group are those of ONNX Runtime's `MatMulNBits`.

    Attributes:
        bits: 8 or 4.
        group_size: number of inputs that share a scale.
        inputs: number of columns of the matrix.
        values: int8 `(outputs, inputs)` for 8 bits; uint8
            `(outputs, ceil(inputs / 2))` for 4 bits.
        scales: float16 `(outputs, ceil(inputs / group_size))`.
        zeros: for 4 bits, the nibbles that stand for zero, uint8 of the shape of
            `scales`; `None` if the matrix is symmetric, where nibble 8 stands for zero.

    Raises:
        ValueError: If a shape or dtype is not as above.

    Example:
        >>> matrix = QuantizedMatrix(
        ...     bits=4, group_size=2, inputs=3,
        ...     values=np.array([[0x79, 0x0A]], "uint8"),
        ...     scales=np.array([[0.5, 2]], "float16"),
        ... )
        >>> matrix.dequantize().tolist()
        [[0.5, -0.5, 4.0]]
    """

    bits: int
    group_size: int
    inputs: int
    values: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray | None = None

    def __post_init__(self) -> None:
        check_format(self.bits, self.group_size, self.zeros is None)
        columns = stored_columns(self.bits, self.inputs)
        groups = count_groups(self.inputs, self.group_size)
        value_dtype = "int8" if self.bits == 8 else "uint8"
        self._check_array("values", value_dtype, columns)
        self._check_array("scales", "float16", groups)
        if self.zeros is not None:
            self._check_array("zeros", "uint8", groups)

    def _check_array(self, name, dtype, columns):
        array, expected = getattr(self, name), (len(self.values), columns)
        if array.dtype != dtype or array.shape != expected:
            raise ValueError(
                f"`{name}` must be a {dtype} array of shape {expected} for "
                f"bits={self.bits}, inputs={self.inputs} and "
                f"group_size={self.group_size}. Received: {array.dtype} of shape "
                f"{array.shape}"
            )

    @property
    def shape(self) -> tuple[int, int]:
        """The shape `(outputs, inputs)` of the matrix."""
        return len(self.values), self.inputs

    @property
    def groups(self) -> int:
        """The number of groups of an output."""
        return self.scales.shape[1]

    @property
    def nbytes(self) -> int:
        """The size of the arrays in bytes."""
        zeros = 0 if self.zeros is None else self.zeros.nbytes
        return self.values.nbytes + self.scales.nbytes + zeros

    def rows(self, start: int, stop: int) -> QuantizedMatrix:
        """Returns some outputs, as views.

        Args:
            start: The first output.
            stop: The output after the last.
        """
        return dataclasses.replace(
            self,
            values=self.values[start:stop],
            scales=self.scales[start:stop],
            zeros=None if self.zeros is None else self.zeros[start:stop],
        )

    def integers(self) -> np.ndarray:
        """Returns the values without packing, less the zero point of symmetric values.

        Returns:
            int8 array `(outputs, inputs)`, from -8 to 7 for 4 bits.
        """
        if self.bits == 8:
            return self.values
        return unpack_nibbles(self.values, self.inputs).view("int8") - np.int8(
            NIBBLE_ZERO
        )

    def dequantize(self, dtype: DType = "float32") -> np.ndarray:
        """Returns the weights.

        Args:
            dtype: A floating-point dtype. The weights are exact in float32, and are
                rounded once to another.

        Returns:
            Array `(outputs, inputs)`.
        """
        weights = np.empty(self.shape, dtype)
        step = max(1, _BLOCK // max(1, self.inputs))
        for start in range(0, len(weights), step):
            rows = slice(start, start + step)
            weights[rows] = self.rows(start, start + step)._dequantize_block()
        return weights

    def _dequantize_block(self):
        integers = self.integers()
        if self.zeros is not None:
            zeros = self.zeros.astype("int8") - np.int8(NIBBLE_ZERO)
            integers = integers - expand_groups(zeros, self.group_size, self.inputs)
        scales = self.scales.astype("float32")
        return integers * expand_groups(scales, self.group_size, self.inputs)


def check_format(bits: int, group_size: int, symmetric: bool) -> None:
    """Checks that there are matrices of a number of bits and a group size.

    Args:
        bits: Number of bits.
        group_size: Number of inputs that share a scale.
        symmetric: Whether there are no zero points.

    Raises:
        ValueError: If `bits` is not 8 or 4, the group size is not positive, or 8 bits
            have zero points.

    Example:
        >>> check_format(4, 32, symmetric=True)
    """
    if bits not in (8, 4):
        raise ValueError(f"`bits` must be 8 or 4. Received: bits={bits!r}")
    if group_size < 1:
        raise ValueError(
            f"`group_size` must be a positive integer. Received: {group_size!r}"
        )
    if bits == 8 and not symmetric:
        raise ValueError("Matrices of 8 bits have no zero points. Received: bits=8")


def count_groups(inputs: int, group_size: int) -> int:
    """Returns the number of groups of an output, the last of which may be shorter.

    Example:
        >>> count_groups(inputs=100, group_size=32)
        4
    """
    return math.ceil(inputs / group_size)


def stored_columns(bits: int, inputs: int) -> int:
    """Returns the number of bytes of the values of an output.

    Example:
        >>> stored_columns(bits=4, inputs=5)
        3
    """
    return inputs if bits == 8 else (inputs + 1) // 2


def expand_groups(groups: np.ndarray, group_size: int, inputs: int) -> np.ndarray:
    """Repeats what each group has for its inputs.

    Args:
        groups: Array `(outputs, groups)`.
        group_size: Number of inputs of a group.
        inputs: Number of inputs.

    Returns:
        Array `(outputs, inputs)`; `(outputs, 1)` if there is one group.

    Example:
        >>> expand_groups(np.array([[1, 2]]), group_size=2, inputs=3)
        array([[1, 1, 2]])
    """
    if groups.shape[1] == 1:
        return groups
    return np.repeat(groups, group_size, axis=1)[:, :inputs]


def pack_nibbles(nibbles: np.ndarray) -> np.ndarray:
    """Packs two values of 4 bits in a byte, the first in the low nibble.

    Args:
        nibbles: uint8 array `(outputs, inputs)` of values from 0 to 15.

    Returns:
        uint8 array `(outputs, ceil(inputs / 2))`. The last high nibble of an odd number
        of inputs is 8, which stands for zero.

    Example:
        >>> pack_nibbles(np.array([[1, 2, 3]], "uint8")).tolist()
        [[33, 131]]
    """
    low, high = nibbles[:, ::2], nibbles[:, 1::2]
    packed = np.full(low.shape, NIBBLE_ZERO << 4, "uint8")
    packed[:, : high.shape[1]] = high << 4
    packed |= low
    return packed


def unpack_nibbles(packed: np.ndarray, inputs: int) -> np.ndarray:
    """Returns the values that `pack_nibbles` packed.

    Args:
        packed: uint8 array `(outputs, ceil(inputs / 2))`.
        inputs: Number of values of an output.

    Returns:
        uint8 array `(outputs, inputs)`.

    Example:
        >>> unpack_nibbles(np.array([[33, 131]], "uint8"), inputs=3).tolist()
        [[1, 2, 3]]
    """
    nibbles = np.empty((len(packed), 2 * packed.shape[1]), "uint8")
    nibbles[:, ::2] = packed & 15
    nibbles[:, 1::2] = packed >> 4
    return nibbles[:, :inputs]
