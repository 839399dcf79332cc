"""Arrays are turned, cast and written as NumPy would, in blocks."""

import io

import numpy as np
import pytest

from keras_openllama.convert import arrays
from keras_openllama.convert.stored import numpy_dtype

pytestmark = pytest.mark.backend_free

DTYPES = ("float32", "bfloat16", "float16")


def some(shape, dtype):
    return np.random.default_rng(0).standard_normal(shape).astype(numpy_dtype(dtype))


@pytest.mark.parametrize("shape", [(1, 1), (300, 700), (128, 256), (129, 257), (3,)])
def test_turned_matrices_become_contiguous(shape):
    array = some(shape, "float32").T
    result = arrays.contiguous(array)
    assert result.flags.c_contiguous
    assert np.array_equal(result, array)
    assert arrays.contiguous(result) is result


@pytest.mark.parametrize("turned", [True, False])
@pytest.mark.parametrize("target", DTYPES)
@pytest.mark.parametrize("source", DTYPES)
def test_what_is_written_are_the_elements_in_order(source, target, turned, monkeypatch):
    monkeypatch.setattr(arrays, "_BLOCK_BYTES", 1000)
    array = some((700, 300), source)
    array = array.T if turned else array
    file = io.BytesIO()
    arrays.write(file, array, target)
    expected = np.ascontiguousarray(array).astype(numpy_dtype(target))
    assert file.getvalue() == expected.tobytes()


@pytest.mark.parametrize("shape", [(), (0,), (0, 5), (5, 0)])
def test_empty_arrays_and_numbers_are_written(shape):
    file = io.BytesIO()
    arrays.write(file, np.ones(shape, "float32"), "float16")
    assert len(file.getvalue()) == 2 * np.prod(shape, dtype=int)


@pytest.mark.parametrize("source", ["float32", "bfloat16"])
@pytest.mark.parametrize("value", [1e6, -1e6, np.inf])
def test_float16_refuses_what_it_cannot_hold(source, value):
    array = some((2000, 3), source)
    array[0, 0] = np.nan  # Which it can, and which compares with nothing.
    arrays.cast(array, np.float16)
    array[1999, 2] = value
    with pytest.raises(ValueError, match="beyond float16's range of ±65504"):
        arrays.cast(array, np.float16)
    arrays.cast(array, numpy_dtype("bfloat16"))
