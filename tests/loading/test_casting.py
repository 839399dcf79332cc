"""Values in files become tensors of the backend: exact, on their own memory."""

import keras
import numpy as np
import pytest

from keras_openllama.checkpoints.tensors import MappedFile, MappedTensor, numpy_dtype
from keras_openllama.loading import casting
from keras_openllama.loading.uninitialized import fill, without_weights

EVERY_FLOAT16 = np.arange(65536, dtype="uint16").view("float16")


def empty_variable(shape, dtype):
    with without_weights():
        return keras.Variable("zeros", shape=shape, dtype=dtype)


def on_file(tmp_path, array, lead=0):
    """The array on a mapped file, `lead` bytes from its start."""
    path = tmp_path / "numbers"
    path.write_bytes(bytes(lead) + array.tobytes())
    strides = tuple(s // array.itemsize for s in array.strides)
    stored = MappedTensor(
        "x", array.dtype.name, array.shape, strides, lead, MappedFile(path)
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
def test_casts_are_those_of_numpy(tmp_path, monkeypatch, source, target, small):
    monkeypatch.setattr(casting, "_SMALL", 1 << 30 if small else 0)
    finite = EVERY_FLOAT16[np.isfinite(EVERY_FLOAT16)]
    array = finite[: 200 * 317].reshape(200, 317).astype(numpy_dtype(source))
    if target == "float16":  # A bfloat16 near float16's largest may round beyond it.
        array = np.where(np.abs(array.astype("float32")) > 65000, 0, array)
        array = array.astype(numpy_dtype(source))
    stored, _ = on_file(tmp_path, array)
    variable = empty_variable(array.shape, target)
    value = casting.value_for(variable, stored.array())
    expected = array.astype(numpy_dtype(target))
    assert keras.backend.standardize_dtype(value.dtype) == target
    np.testing.assert_array_equal(bits(value), expected.astype("float32"))


@pytest.mark.parametrize("small", [True, False])
def test_values_outlive_the_file(tmp_path, monkeypatch, small):
    monkeypatch.setattr(casting, "_SMALL", 1 << 30 if small else 0)
    array = np.arange(64 * 64, dtype="float32").reshape(64, 64)
    stored, path = on_file(tmp_path, array)
    variable = empty_variable(array.shape, "float32")
    fill(variable, casting.value_for(variable, stored.array()))
    with open(path, "r+b") as file:  # The map would show it.
        file.write(bytes(array.nbytes))
    assert not stored.array().any()
    np.testing.assert_array_equal(keras.ops.convert_to_numpy(variable), array)


def test_tensors_at_odd_places_are_read(tmp_path):
    array = np.arange(12, dtype="float32").reshape(3, 4)
    stored, _ = on_file(tmp_path, array, lead=3)
    value = casting.value_for(empty_variable((3, 4), "float32"), stored.array())
    np.testing.assert_array_equal(keras.ops.convert_to_numpy(value), array)


@pytest.mark.parametrize("source", ["float32", "bfloat16"])
def test_what_is_beyond_float16_is_refused(tmp_path, source):
    array = np.zeros((3000, 2), numpy_dtype(source))
    array[2999, 1] = -70000
    stored, _ = on_file(tmp_path, array)
    with pytest.raises(ValueError, match="beyond float16's range of ±65504"):
        casting.value_for(empty_variable((3000, 2), "float16"), stored.array())
