"""Arrays are transposed, cast and written in blocks, with the results of NumPy."""

import io

import numpy as np
import pytest

from keras_openllama.checkpoints import array_io
from keras_openllama.checkpoints.tensors import numpy_dtype

pytestmark = pytest.mark.backend_free

DTYPES = ("float32", "bfloat16", "float16")


def random_array(shape, dtype):
    return np.random.default_rng(0).standard_normal(shape).astype(numpy_dtype(dtype))


@pytest.mark.parametrize("shape", [(1, 1), (300, 700), (128, 256), (129, 257), (3,)])
def test_contiguous_copies_transposed_matrices(shape):
    array = random_array(shape, "float32").T
    result = array_io.contiguous(array)
    assert result.flags.c_contiguous
    assert np.array_equal(result, array)
    assert array_io.contiguous(result) is result


@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("target", DTYPES)
@pytest.mark.parametrize("source", DTYPES)
def test_write_array_writes_the_elements_in_c_order(
    source, target, transposed, monkeypatch
):
    monkeypatch.setattr(array_io, "_BLOCK_BYTES", 1000)
    array = random_array((700, 300), source)
    array = array.T if transposed else array
    file = io.BytesIO()
    array_io.write_array(file, array, array.shape, target)
    expected = np.ascontiguousarray(array).astype(numpy_dtype(target))
    assert file.getvalue() == expected.tobytes()


@pytest.mark.parametrize("shape", [(), (0,), (0, 5), (5, 0)])
def test_write_array_writes_empty_arrays_and_scalars(shape):
    file = io.BytesIO()
    array_io.write_array(file, np.ones(shape, "float32"), shape, "float16")
    assert len(file.getvalue()) == 2 * np.prod(shape, dtype=int)


def test_write_array_rejects_another_shape():
    array = random_array((3, 5), "float32").T
    with pytest.raises(ValueError, match=r"has shape \(5, 3\), expected \(3, 5\)"):
        array_io.write_array(io.BytesIO(), array, (3, 5), "float32")


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
def test_cast_rejects_values_beyond_the_range_of_the_dtype(source, target, value):
    target = numpy_dtype(target)
    array = np.zeros((2000, 3), numpy_dtype(source))
    array[0] = np.nan, np.inf, -np.inf  # Every dtype can represent these.
    array_io.cast(array, target)
    array[1999, 2] = value
    with pytest.raises(ValueError, match=f"beyond {target.name}'s range of ±"):
        array_io.cast(array, target)
    with pytest.raises(ValueError, match="use dtype="):
        array_io.check_range(array, target)
