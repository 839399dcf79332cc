"""Large NumPy arrays: turned, cast and written a block at a time.

NumPy turns a matrix row by row, and so fetches each line of the cache once for each of
its elements. By tiles it is four times as fast (`benchmarks/README.md`).
"""

import numpy as np

from keras_openllama.convert.stored import numpy_dtype

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


def write(file, array, dtype):
    """Writes an array's elements, the last axis varying fastest.

    Args:
        file: binary file, open for writing.
        array: NumPy array of floats. At most a few MB of it are copied at a time, and
            nothing where it is of that order and dtype already.
        dtype: name of the dtype to write.

    Raises:
        ValueError: if `dtype` is float16 and a value is beyond its range.
        OSError: if the file cannot be written.
    """
    target = numpy_dtype(dtype)
    if array.dtype == target and array.flags.c_contiguous:
        file.write(_as_bytes(array))
        return
    array = np.atleast_1d(array)
    for block in row_blocks(array):
        # Turned before it is cast: a cast across lines of the cache is slow.
        file.write(_as_bytes(cast(contiguous(array[block]), target)))


def row_blocks(array):
    """Slices of the first axis, each of at most some MB and of whole tiles."""
    row_bytes = max(1, array.nbytes // max(1, len(array)))
    rows = max(_TILE_ROWS, _BLOCK_BYTES // row_bytes // _TILE_ROWS * _TILE_ROWS)
    return [slice(start, start + rows) for start in range(0, len(array), rows)]


def cast(array, dtype):
    """Casts; to float16 only what it can hold.

    Raises:
        ValueError: if a value is beyond float16's range.
    """
    dtype = np.dtype(dtype)
    if array.dtype == dtype:
        return array
    if dtype == np.float16:
        check_float16(array)
    return array.astype(dtype)


def check_float16(array):
    """Raises a `ValueError` if a value is beyond float16's range."""
    largest = float(np.finfo(np.float16).max)
    array = np.atleast_1d(array)
    for block in row_blocks(array):
        # Both comparisons are false for a NaN, which float16 can hold.
        values = array[block].astype(np.float32, copy=False)
        if (values > largest).any() or (values < -largest).any():
            raise ValueError(
                f"it has values beyond float16's range of ±{largest:.0f}; take "
                "dtype='bfloat16' or dtype='float32'"
            )


def _as_bytes(array):
    return array.reshape(-1).view(np.uint8)
