"""Transposes, casts and writes large NumPy arrays, one block at a time.

NumPy copies a transposed matrix row by row, so it loads each cache line once for every
element of the line. Copying it in tiles is four times as fast
(`benchmarks/README.md`).
"""

from typing import BinaryIO

import ml_dtypes
import numpy as np
from numpy.typing import DTypeLike, NDArray

from keras_openllama.checkpoints.formats import DTYPES as FLOATS
from keras_openllama.checkpoints.tensors import numpy_dtype

# A tile of 16-bit numbers takes 64 KB and fits into a core's cache. This was the
# fastest of all combinations of 32 to 256 rows and columns.
_TILE_ROWS, _TILE_COLUMNS = 128, 256
_BLOCK_BYTES = 8 << 20  # Heuristic: how much is cast and written at a time.


def contiguous(array: NDArray) -> NDArray:
    """Returns the array in C order, without a copy if it is contiguous already.

    Args:
        array: Array of any shape. A transposed matrix is copied in tiles.

    Returns:
        C-contiguous array of the same shape and values.

    Example:
        >>> contiguous(np.arange(6).reshape(2, 3).T).flags.c_contiguous
        True
    """
    if array.ndim != 2 or array.strides[0] >= array.strides[1]:
        return np.ascontiguousarray(array)
    result = np.empty(array.shape, array.dtype)
    rows, columns = array.shape
    for row in range(0, rows, _TILE_ROWS):
        for column in range(0, columns, _TILE_COLUMNS):
            tile = np.s_[row : row + _TILE_ROWS, column : column + _TILE_COLUMNS]
            result[tile] = array[tile]
    return result


def write_array(
    file: BinaryIO,
    array: NDArray,
    shape: tuple[int, ...],
    dtype: str,
    remedy: str | None = None,
) -> None:
    """Writes the elements of an array in C order.

    Args:
        file: Binary file that is open for writing.
        array: Array of floats. A few MB of it are copied at a time.
        shape: The shape that the header of the file declares for it.
        dtype: Name of the dtype to write.
        remedy: See `cast`.

    Raises:
        ValueError: If the array has another shape, or a value exceeds the range of the
            dtype.
        OSError: If the file cannot be written.

    Example:
        >>> with open("numbers", "wb") as file:
        ...     write_array(file, np.ones((2, 3), "float32"), (2, 3), "float16")
        >>> np.fromfile("numbers", "float16").tolist()
        [1.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    """
    if array.shape != tuple(shape):
        raise ValueError(f"it has shape {array.shape}, expected {tuple(shape)}")
    array = np.atleast_1d(array)
    for block in row_blocks(array):
        rows = array[block]
        # Always copied: when a thread writes the block, the pages of a mapped file have
        # been released, and would be read again and stay in memory. Transposed before
        # the cast, since a strided cast is slow.
        rows = rows.copy() if rows.flags.c_contiguous else contiguous(rows)
        file.write(_as_bytes(cast(rows, numpy_dtype(dtype), remedy)))


def row_blocks(array: NDArray) -> list[slice]:
    """Splits the first axis of an array into blocks of a few MB.

    Args:
        array: Array of at least one axis.

    Returns:
        Slices of the first axis. All but the last are multiples of the tile size.

    Example:
        >>> row_blocks(np.zeros((30_000, 50)))
        [slice(0, 20864, None), slice(20864, 41728, None)]
    """
    row_bytes = max(1, array.nbytes // max(1, len(array)))
    rows = max(_TILE_ROWS, _BLOCK_BYTES // row_bytes // _TILE_ROWS * _TILE_ROWS)
    return [slice(start, start + rows) for start in range(0, len(array), rows)]


def cast(array: NDArray, dtype: DTypeLike, remedy: str | None = None) -> NDArray:
    """Casts an array, and raises an error if a value overflows.

    Args:
        array: Array of floats.
        dtype: A floating-point dtype.
        remedy: What to do if a value overflows, for the error message. `None` names
            the other dtypes.

    Returns:
        Array of the same shape; the array itself if it has the dtype already.

    Raises:
        ValueError: If a finite value becomes infinite.

    Example:
        >>> cast(np.array([1e6]), "float16")
        Traceback (most recent call last):
        ValueError: it has values beyond float16's range of ±65504; use ...
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
            f"it has values beyond {name}'s range of ±{largest:.6g}; "
            f"{remedy or 'use ' + ' or '.join(others)}"
        )
    return result


def check_range(array: NDArray, dtype: DTypeLike) -> None:
    """Raises a `ValueError` if a finite value exceeds the range of a dtype."""
    array = np.atleast_1d(array)
    for block in row_blocks(array):
        cast(contiguous(array[block]), dtype)


def _infinite(array):
    if array.dtype.itemsize != 2:
        return np.isinf(array)
    # Compares bits, since NumPy would convert every number to float32 first.
    bits = array.view(np.uint16) & 0x7FFF
    return bits == np.array(np.inf, array.dtype).view(np.uint16)


def _as_bytes(array):
    return array.reshape(-1).view(np.uint8)
