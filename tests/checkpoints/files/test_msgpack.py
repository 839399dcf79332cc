"""`read_msgpack` maps the arrays of EasyLM's and Flax's files, and rejects others."""

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
def test_read_msgpack_reads_what_the_libraries_write(tmp_path, write, dtype):
    arrays = some_arrays(dtype)
    write(tmp_path / "file", arrays)
    tensors = msgpack_files.read_msgpack(tmp_path / "file")
    assert set(tensors) == set(arrays)
    assert all(same(tensors[key], array) for key, array in arrays.items())


@pytest.mark.parametrize("write", [write_stream, write_map])
def test_read_msgpack_joins_chunked_arrays(tmp_path, write, monkeypatch):
    monkeypatch.setattr(flax.serialization, "MAX_CHUNK_SIZE", 1000)
    arrays = some_arrays()
    write(tmp_path / "file", arrays)
    assert b"__msgpack_chunked_array__" in (tmp_path / "file").read_bytes()
    tensors = msgpack_files.read_msgpack(tmp_path / "file")
    for key, array in arrays.items():
        assert same(tensors[key], array)
        assert np.array_equal(tensors[key].transposed().array(), array.T)
        tensors[key].prefetch()
        tensors[key].release()
        assert same(tensors[key], array)


def test_read_msgpack_ignores_values_that_are_not_arrays(tmp_path):
    arrays = {
        ("step",): np.int32(7),
        ("opt_state", "1", "count"): np.zeros((), "int32"),
        ("opt_state", "0"): {},
        ("params", "w"): np.ones(3, "float32"),
    }
    write_stream(tmp_path / "file", arrays)
    tensors = msgpack_files.read_msgpack(tmp_path / "file")
    assert set(tensors) == {("opt_state", "1", "count"), ("params", "w")}


@pytest.mark.parametrize("write", [write_stream, write_map])
def test_read_msgpack_rejects_a_truncated_file(tmp_path, write):
    path = tmp_path / "file"
    write(path, some_arrays(large=2))
    data = path.read_bytes()
    complete = set(msgpack_files.read_msgpack(path))
    for length in [*range(0, 900, 7), *range(900, len(data), 9973), len(data) - 1]:
        path.write_bytes(data[:length])
        try:
            tensors = msgpack_files.read_msgpack(path)
        except ValueError as error:
            assert str(path) in str(error) and "download it again" in str(error)
        else:  # A stream that ends between two records is valid, with fewer arrays.
            assert set(tensors) < complete


@pytest.mark.parametrize(
    "data, message",
    [
        (b"\xc1", "not valid msgpack"),
        (
            b"version https://git-lfs.github.com/spec/v1",
            "Git LFS pointer: `git lfs pull`",
        ),
        (b"PK\x03\x04", "is not a pair"),
        (msgpack.packb([["a"], 3]), "value of a is not of type bytes"),
        (msgpack.packb([["a/b"], b"\xc0"]), "is not a list of strings"),
        (bytes(8) + b'{"a":{}}', "looks like a safetensors file: pass its directory"),
        (b"\x92\xdc\xff\xff" + b"\x90" * 65_535, "more than 10,000 values"),
        (msgpack.packb([[1], b""]), "is not a list of strings"),
        (msgpack.packb([["a"], b"\xc0\xc0"]), "data after the value of a"),
        (msgpack.packb({"a": 1}) + b"\0", "data after its map"),
        (msgpack.packb({1: 1}), "its map has the invalid key 1"),
        (b"\xdd\xff\xff\xff\xff", "4,294,967,295 values are expected"),
        (b"\x91" * 100_000, "RecursionError|recursion"),
        (msgpack.packb({"a": msgpack.ExtType(1, b"\x90")}), "not written by Flax"),
    ],
)
def test_read_msgpack_rejects_other_files(tmp_path, data, message, monkeypatch):
    monkeypatch.setattr(msgpack_files, "_MAX_VALUES", 10_000)
    path = tmp_path / "file"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=f"(?s){path}.*({message})"):
        msgpack_files.read_msgpack(path)


@pytest.mark.parametrize(
    "array, message",
    [
        (((2, 3), "float32", bytes(20)), r"of shape \[2, 3\], has 20 bytes"),
        (((2, -3), "float32", bytes(24)), "an invalid shape"),
        (((1,) * 40, "float32", bytes(4)), "an invalid shape"),
        (((2,), "float17", bytes(4)), "dtype 'float17'"),
        (((2,), "float32", "text"), "has dtype"),
    ],
)
def test_read_msgpack_rejects_damaged_arrays(tmp_path, array, message):
    path = tmp_path / "file"
    path.write_bytes(msgpack.packb({"a": msgpack.ExtType(1, msgpack.packb(array))}))
    with pytest.raises(ValueError, match=message):
        msgpack_files.read_msgpack(path)
