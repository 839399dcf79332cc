"""Arrays are turned, cast and written as NumPy would, in blocks."""

import io

import numpy as np
import pytest

from keras_openllama.checkpoints import array_io
from keras_openllama.checkpoints.tensors import numpy_dtype

pytestmark = pytest.mark.backend_free

DTYPES = ("float32", "bfloat16", "float16")


def some(shape, dtype):
    return np.random.default_rng(0).standard_normal(shape).astype(numpy_dtype(dtype))


@pytest.mark.parametrize("shape", [(1, 1), (300, 700), (128, 256), (129, 257), (3,)])
def test_turned_matrices_become_contiguous(shape):
    array = some(shape, "float32").T
    result = array_io.contiguous(array)
    assert result.flags.c_contiguous
    assert np.array_equal(result, array)
    assert array_io.contiguous(result) is result


@pytest.mark.parametrize("turned", [True, False])
@pytest.mark.parametrize("target", DTYPES)
@pytest.mark.parametrize("source", DTYPES)
def test_what_is_written_are_the_elements_in_order(source, target, turned, monkeypatch):
    monkeypatch.setattr(array_io, "_BLOCK_BYTES", 1000)
    array = some((700, 300), source)
    array = array.T if turned else array
    file = io.BytesIO()
    array_io.write(file, array, array.shape, target)
    expected = np.ascontiguousarray(array).astype(numpy_dtype(target))
    assert file.getvalue() == expected.tobytes()


@pytest.mark.parametrize("shape", [(), (0,), (0, 5), (5, 0)])
def test_empty_arrays_and_numbers_are_written(shape):
    file = io.BytesIO()
    array_io.write(file, np.ones(shape, "float32"), shape, "float16")
    assert len(file.getvalue()) == 2 * np.prod(shape, dtype=int)


def test_another_shape_than_stated_is_refused():
    array = some((3, 5), "float32").T
    with pytest.raises(ValueError, match=r"has shape \(5, 3\), and \(3, 5\) is stated"):
        array_io.write(io.BytesIO(), array, (3, 5), "float32")


@pytest.mark.parametrize(
    "source, target, value",
    [
        ("float32", "float16", 1e6),
        ("float32", "float16", -65520.0),
        ("bfloat16", "float16", 1e6),
        ("float32", "bfloat16", 3.4e38),
        ("float64", "float32", -1e300),
    ],
)
def test_what_a_dtype_cannot_hold_is_refused(source, target, value):
    target = numpy_dtype(target)
    array = np.zeros((2000, 3), numpy_dtype(source))
    array[0] = np.nan, np.inf, -np.inf  # Which each can hold.
    array_io.cast(array, target)
    array[1999, 2] = value
    with pytest.raises(ValueError, match=f"beyond {target.name}'s range of ±"):
        array_io.cast(array, target)
    with pytest.raises(ValueError, match="take dtype="):
        array_io.check_range(array, target)
