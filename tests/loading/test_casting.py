"""`value_for` casts like NumPy, and returns tensors with memory of their own."""

import keras
import numpy as np
import pytest

from keras_openllama.checkpoints.tensors import MappedFile, MappedTensor, numpy_dtype
from keras_openllama.loading import casting
from keras_openllama.loading.uninitialized import assign_value, without_weights

EVERY_FLOAT16 = np.arange(65536, dtype="uint16").view("float16")


def empty_variable(shape, dtype):
    with without_weights():
        return keras.Variable("zeros", shape=shape, dtype=dtype)


def mapped(tmp_path, array, offset=0):
    """Writes the array to a file at an offset in bytes, and maps it."""
    path = tmp_path / "numbers"
    path.write_bytes(bytes(offset) + array.tobytes())
    strides = tuple(s // array.itemsize for s in array.strides)
    stored = MappedTensor(
        "x", array.dtype.name, array.shape, strides, offset, MappedFile(path)
    )
    return stored, path


def bits(tensor):
    dtype = keras.backend.standardize_dtype(tensor.dtype)
    if dtype == "bfloat16":  # Every bfloat16 is a float32.
        tensor = keras.ops.cast(tensor, "float32")
    return keras.ops.convert_to_numpy(tensor)


@pytest.mark.parametrize("small", [True, False])
@pytest.mark.parametrize("target", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("source", ["float16", "bfloat16", "float32"])
def test_value_for_casts_like_numpy(tmp_path, monkeypatch, source, target, small):
    monkeypatch.setattr(casting, "_SMALL", 1 << 30 if small else 0)
    finite = EVERY_FLOAT16[np.isfinite(EVERY_FLOAT16)]
    array = finite[: 200 * 317].reshape(200, 317).astype(numpy_dtype(source))
    if target == "float16":  # A bfloat16 near float16's largest may round beyond it.
        array = np.where(np.abs(array.astype("float32")) > 65000, 0, array)
        array = array.astype(numpy_dtype(source))
    stored, _ = mapped(tmp_path, array)
    variable = empty_variable(array.shape, target)
    value = casting.value_for(variable, stored.array())
    expected = array.astype(numpy_dtype(target))
    assert keras.backend.standardize_dtype(value.dtype) == target
    np.testing.assert_array_equal(bits(value), expected.astype("float32"))


@pytest.mark.parametrize("small", [True, False])
def test_value_for_does_not_share_memory_with_the_file(tmp_path, monkeypatch, small):
    monkeypatch.setattr(casting, "_SMALL", 1 << 30 if small else 0)
    array = np.arange(64 * 64, dtype="float32").reshape(64, 64)
    stored, path = mapped(tmp_path, array)
    variable = empty_variable(array.shape, "float32")
    assign_value(variable, casting.value_for(variable, stored.array()))
    with open(path, "r+b") as file:  # The mapped memory changes, too.
        file.write(bytes(array.nbytes))
    assert not stored.array().any()
    np.testing.assert_array_equal(keras.ops.convert_to_numpy(variable), array)


def test_value_for_reads_unaligned_tensors(tmp_path):
    array = np.arange(12, dtype="float32").reshape(3, 4)
    stored, _ = mapped(tmp_path, array, offset=3)
    value = casting.value_for(empty_variable((3, 4), "float32"), stored.array())
    np.testing.assert_array_equal(keras.ops.convert_to_numpy(value), array)


@pytest.mark.parametrize("source", ["float32", "bfloat16"])
def test_value_for_rejects_values_beyond_float16(tmp_path, source):
    array = np.zeros((3000, 2), numpy_dtype(source))
    array[2999, 1] = -70000
    stored, _ = mapped(tmp_path, array)
    with pytest.raises(ValueError, match="beyond float16's range of ±65504"):
        casting.value_for(empty_variable((3000, 2), "float16"), stored.array())
