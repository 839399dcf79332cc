"""Large NumPy arrays: turned, cast and written a block at a time.

NumPy turns a matrix row by row, and so fetches each line of the cache once for each of
its elements. By tiles it is four times as fast (`benchmarks/README.md`).
"""

import ml_dtypes
import numpy as np

from keras_openllama.checkpoints.formats import DTYPES as FLOATS
from keras_openllama.checkpoints.tensors import numpy_dtype

# Ours: a tile of 16-bit numbers, 64 KB, stays in a core's cache; measured best of 32
# to 256 rows and columns.
_TILE_ROWS, _TILE_COLUMNS = 128, 256
_BLOCK_BYTES = 8 << 20  # Ours: what is cast and written at once.


def contiguous(array):
    """The array with its last axis varying fastest; itself where it is so already."""
    if array.ndim != 2 or array.strides[0] >= array.strides[1]:
        return np.ascontiguousarray(array)
    result = np.empty(array.shape, array.dtype)
    rows, columns = array.shape
    for row in range(0, rows, _TILE_ROWS):
        for column in range(0, columns, _TILE_COLUMNS):
            tile = np.s_[row : row + _TILE_ROWS, column : column + _TILE_COLUMNS]
            result[tile] = array[tile]
    return result


def write(file, array, shape, dtype):
    """Writes an array's elements, the last axis varying fastest.

    Args:
        file: binary file, open for writing.
        array: NumPy array of floats. Some MB of it are copied at a time.
        shape: tuple of ints, the shape that is stated for it elsewhere in the file.
        dtype: name of the dtype to write.

    Raises:
        ValueError: if the shape is another one, or a value is beyond the dtype's range.
        OSError: if the file cannot be written.
    """
    if array.shape != tuple(shape):
        raise ValueError(f"it has shape {array.shape}, and {tuple(shape)} is stated")
    array = np.atleast_1d(array)
    for block in row_blocks(array):
        rows = array[block]
        # A copy in any case: by the time that a thread writes it, a mapped file's pages
        # have been given back, and would come again and stay. Turned before it is cast:
        # a cast across lines of the cache is slow.
        rows = rows.copy() if rows.flags.c_contiguous else contiguous(rows)
        file.write(_as_bytes(cast(rows, numpy_dtype(dtype))))


def row_blocks(array):
    """Slices of the first axis, each of at most some MB and of whole tiles."""
    row_bytes = max(1, array.nbytes // max(1, len(array)))
    rows = max(_TILE_ROWS, _BLOCK_BYTES // row_bytes // _TILE_ROWS * _TILE_ROWS)
    return [slice(start, start + rows) for start in range(0, len(array), rows)]


def cast(array, dtype):
    """Casts to a dtype that can hold the values.

    Raises:
        ValueError: if a number becomes infinite by it.
    """
    dtype = np.dtype(dtype)
    if array.dtype == dtype:
        return array
    with np.errstate(over="ignore"):
        result = array.astype(dtype)
    infinite = _infinite(result)
    if infinite.any() and np.isfinite(array[infinite].astype(np.float64)).any():
        name = dtype.name
        largest = float(ml_dtypes.finfo(dtype).max)
        others = [f"dtype='{other}'" for other in FLOATS if other != name]
        raise ValueError(
            f"it has values beyond {name}'s range of ±{largest:.6g}; take "
            f"{' or '.join(others)}"
        )
    return result


def check_range(array, dtype):
    """Raises a `ValueError` if a number of the array is beyond the dtype's range."""
    array = np.atleast_1d(array)
    for block in row_blocks(array):
        cast(contiguous(array[block]), dtype)


def _infinite(array):
    if array.dtype.itemsize != 2:
        return np.isinf(array)
    # By its bits: NumPy would make float32 of each number first.
    bits = array.view(np.uint16) & 0x7FFF
    return bits == np.array(np.inf, array.dtype).view(np.uint16)


def _as_bytes(array):
    return array.reshape(-1).view(np.uint8)
