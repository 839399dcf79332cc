"""EasyLM's and Flax's files are read where they lie, or refused."""

import flax.serialization
import msgpack
import numpy as np
import pytest
from easylm_files import DTYPES, some_arrays, write_map, write_stream

from keras_openllama.checkpoints.files import msgpack as msgpack_files

pytestmark = pytest.mark.backend_free


def same(stored, array):
    return stored.dtype == array.dtype.name and np.array_equal(stored.array(), array)


@pytest.mark.parametrize("write", [write_stream, write_map])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_the_libraries_write_is_read(tmp_path, write, dtype):
    arrays = some_arrays(dtype)
    write(tmp_path / "file", arrays)
    tensors = msgpack_files.read(tmp_path / "file")
    assert set(tensors) == set(arrays)
    assert all(same(tensors[key], array) for key, array in arrays.items())


@pytest.mark.parametrize("write", [write_stream, write_map])
def test_arrays_in_chunks_are_joined(tmp_path, write, monkeypatch):
    monkeypatch.setattr(flax.serialization, "MAX_CHUNK_SIZE", 1000)
    arrays = some_arrays()
    write(tmp_path / "file", arrays)
    assert b"__msgpack_chunked_array__" in (tmp_path / "file").read_bytes()
    tensors = msgpack_files.read(tmp_path / "file")
    for key, array in arrays.items():
        assert same(tensors[key], array)
        assert np.array_equal(tensors[key].transposed().array(), array.T)
        tensors[key].touch()
        tensors[key].drop()
        assert same(tensors[key], array)


def test_what_is_no_array_is_left_out(tmp_path):
    arrays = {
        ("step",): np.int32(7),
        ("opt_state", "1", "count"): np.zeros((), "int32"),
        ("opt_state", "0"): {},
        ("params", "w"): np.ones(3, "float32"),
    }
    write_stream(tmp_path / "file", arrays)
    tensors = msgpack_files.read(tmp_path / "file")
    assert set(tensors) == {("opt_state", "1", "count"), ("params", "w")}


@pytest.mark.parametrize("write", [write_stream, write_map])
def test_a_file_cut_off_anywhere_is_refused(tmp_path, write):
    path = tmp_path / "file"
    write(path, some_arrays(large=2))
    data = path.read_bytes()
    whole = set(msgpack_files.read(path))
    for length in [*range(0, 900, 7), *range(900, len(data), 9973), len(data) - 1]:
        path.write_bytes(data[:length])
        try:
            tensors = msgpack_files.read(path)
        except ValueError as error:
            assert str(path) in str(error) and "get it again" in str(error)
        else:  # Between two records a stream ends well; something is missing then.
            assert set(tensors) < whole


@pytest.mark.parametrize(
    "data, message",
    [
        (b"\xc1", "no msgpack"),
        (b"version https://git-lfs.github.com/spec/v1", "begins no pair"),
        (b"PK\x03\x04", "begins no pair"),
        (msgpack.packb([["a"], 3]), "a is no bytes"),
        (msgpack.packb([["a/b"], b"\xc0"]), "without a key of strings"),
        (bytes(8) + b'{"a":{}}', "looks like a safetensors file: give the directory"),
        (b"\x92\xdc\xff\xff" + b"\x90" * 65_535, "more than 10,000 values"),
        (msgpack.packb([[1], b""]), "without a key of strings"),
        (msgpack.packb([["a"], b"\xc0\xc0"]), "follows the value of a"),
        (msgpack.packb({"a": 1}) + b"\0", "follows its map"),
        (msgpack.packb({1: 1}), "a key of its map is 1"),
        (b"\xdd\xff\xff\xff\xff", "4,294,967,295 values are due"),
        (b"\x91" * 100_000, "RecursionError|recursion"),
        (msgpack.packb({"a": msgpack.ExtType(1, b"\x90")}), "none of Flax's"),
    ],
)
def test_other_files_are_refused(tmp_path, data, message, monkeypatch):
    monkeypatch.setattr(msgpack_files, "_MOST_VALUES", 10_000)
    path = tmp_path / "file"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=f"(?s){path}.*({message})"):
        msgpack_files.read(path)


@pytest.mark.parametrize(
    "array, message",
    [
        (((2, 3), "float32", bytes(20)), r"of shape \[2, 3\], has 20 bytes"),
        (((2, -3), "float32", bytes(24)), "no possible shape"),
        (((1,) * 40, "float32", bytes(4)), "no possible shape"),
        (((2,), "float17", bytes(4)), "dtype 'float17'"),
        (((2,), "float32", "text"), "has dtype"),
    ],
)
def test_damaged_arrays_are_refused(tmp_path, array, message):
    path = tmp_path / "file"
    path.write_bytes(msgpack.packb({"a": msgpack.ExtType(1, msgpack.packb(array))}))
    with pytest.raises(ValueError, match=message):
        msgpack_files.read(path)
