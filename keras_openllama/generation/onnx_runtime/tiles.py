"""Quantized matrices in the order in which the compiled products read them.

A tile is the weights of as many outputs as a vector of the processor has lanes. It has,
for each 32 bits of weights of an output, those of all its outputs beside each other.
"""

from __future__ import annotations

import numpy as np

from keras_openllama.generation.onnx_runtime.matrices import TILED_GROUP, JoinedMatrix


class TiledMatrix:
    """A matrix in tiles.

    Args:
        matrix: the matrix, for which `can_be_tiled` holds.
        lanes: outputs of a tile.

    Attributes:
        groups_per_scale: how many groups of 32 inputs have the same scale.

    Example:
        >>> from keras_openllama.quantization.rounding import quantize_matrix
        >>> matrix = quantize_matrix(np.ones((40, 100), "float32"), 4, group_size=32)
        >>> tiled = TiledMatrix(JoinedMatrix([matrix]), lanes=16)
        >>> tiled.words_shape, tiled.scales_shape
        ((3, 4, 256), (3, 4, 16))
    """

    def __init__(self, matrix: JoinedMatrix, lanes: int) -> None:
        self.matrix, self._lanes = matrix, lanes
        outputs, groups, group_bytes = matrix.values_shape
        self._tiles = -(-outputs // lanes)
        self._groups = groups * group_bytes * 8 // matrix.bits // TILED_GROUP
        self._scales = 1 if matrix.has_one_scale else groups
        self.groups_per_scale = self._groups // self._scales

    @property
    def words_shape(self) -> tuple[int, int, int]:
        """Shape of `words`: tiles, groups of 32 inputs, bytes of a group."""
        return self._tiles, self._groups, self.matrix.bits * 4 * self._lanes

    @property
    def scales_shape(self) -> tuple[int, int, int]:
        """Shape of `scales`: tiles, scales of an output, outputs of a tile."""
        return self._tiles, self._scales, self._lanes

    def words(self) -> np.ndarray:
        """Returns the values, uint8; 128 or 8 is zero."""
        values = self.matrix.values()
        words = values.reshape(len(values), -1).view("uint32")
        return self._tile(words).view("uint8").reshape(self.words_shape)

    def scales(self) -> np.ndarray:
        """Returns the scales, float16."""
        return self._tile(self.matrix.scales("float16")[:, : self._scales])

    def _tile(self, array):
        missing = self._tiles * self._lanes - len(array)
        array = np.pad(array, ((0, missing), (0, 0)))
        tiles = array.reshape(self._tiles, self._lanes, -1).transpose(0, 2, 1)
        return np.ascontiguousarray(tiles)
