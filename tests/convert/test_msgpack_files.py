"""EasyLM's and Flax's files: read where they lie, written as the libraries write."""

import io

import flax.serialization
import flax.traverse_util
import ml_dtypes
import msgpack
import numpy as np
import pytest

from keras_openllama.convert import msgpack_files

pytestmark = pytest.mark.backend_free

DTYPES = {
    "float32": np.float32,
    "bfloat16": ml_dtypes.bfloat16,
    "float16": np.float16,
}


def some_arrays(dtype="float32", large=300):
    """Arrays by key whose sizes need each length of header."""
    random = np.random.default_rng(0)
    shapes = {
        ("transformer", "wte", "embedding"): (large, 300),
        ("transformer", "h", "0", "attention", "wq", "kernel"): (17, 9),
        ("transformer", "h", "0", "attention_norm", "kernel"): (1,),
        ("transformer", "h", "10", "ffn_norm", "kernel"): (130, 3),
        ("transformer", "ln_f", "kernel"): (70_000,),
        ("lm_head", "kernel"): (4, 5),
    }
    return {
        key: random.standard_normal(shape).astype(DTYPES[dtype])
        for key, shape in shapes.items()
    }


def write_as_easylm(path, arrays):
    """What EasyLM's `save_train_state_to_file` does."""
    packer = msgpack.Packer()
    with open(path, "wb") as file:
        for key, value in arrays.items():
            file.write(packer.pack((key, flax.serialization.to_bytes(value))))


def write_as_flax(path, arrays):
    nested = flax.traverse_util.unflatten_dict(arrays)
    path.write_bytes(flax.serialization.msgpack_serialize(nested))


def specs_of(arrays):
    return {key: (a.shape, a.dtype.name) for key, a in arrays.items()}


def same(stored, array):
    return stored.dtype == array.dtype.name and np.array_equal(stored.array(), array)


@pytest.mark.parametrize("write", [write_as_easylm, write_as_flax])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_the_libraries_write_is_read(tmp_path, write, dtype):
    arrays = some_arrays(dtype)
    write(tmp_path / "file", arrays)
    tensors = msgpack_files.read(tmp_path / "file")
    assert set(tensors) == set(arrays)
    assert all(same(tensors[key], array) for key, array in arrays.items())


@pytest.mark.parametrize("write", [write_as_easylm, write_as_flax])
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
    write_as_easylm(tmp_path / "file", arrays)
    tensors = msgpack_files.read(tmp_path / "file")
    assert set(tensors) == {("opt_state", "1", "count"), ("params", "w")}


@pytest.mark.parametrize("dtype", DTYPES)
def test_msgpack_and_flax_read_the_stream_that_is_written(tmp_path, dtype):
    arrays = some_arrays()
    specs = {key: (shape, dtype) for key, (shape, _) in specs_of(arrays).items()}
    with open(tmp_path / "file", "wb") as file:
        msgpack_files.write(file, specs, arrays.values())
    data = (tmp_path / "file").read_bytes()
    assert len(data) == msgpack_files.size(specs)
    found = {}
    for key, value in msgpack.Unpacker(io.BytesIO(data), max_buffer_size=0):
        shape, name, elements = msgpack.unpackb(msgpack.unpackb(value).data)
        array = np.frombuffer(elements, DTYPES[name]).reshape(shape)
        assert np.array_equal(array, flax.serialization.from_bytes(None, value))
        found[tuple(key)] = array
    assert found.keys() == arrays.keys()
    for key, array in arrays.items():
        assert np.array_equal(found[key], array.astype(DTYPES[dtype]))


def test_flax_reads_the_map_that_is_written(tmp_path):
    arrays = some_arrays("bfloat16")
    specs = specs_of(arrays)
    with open(tmp_path / "file", "wb") as file:
        msgpack_files.write(file, specs, arrays.values(), streaming=False)
    data = (tmp_path / "file").read_bytes()
    assert len(data) == msgpack_files.size(specs, streaming=False)
    found = flax.traverse_util.flatten_dict(flax.serialization.msgpack_restore(data))
    assert found.keys() == arrays.keys()
    assert all(np.array_equal(found[key], array) for key, array in arrays.items())


@pytest.mark.parametrize("streaming", [True, False])
def test_the_bytes_are_those_of_the_libraries(tmp_path, streaming):
    arrays = dict(sorted(some_arrays().items()))  # As Flax sorts them.
    write = write_as_easylm if streaming else write_as_flax
    write(tmp_path / "theirs", arrays)
    with open(tmp_path / "ours", "wb") as file:
        msgpack_files.write(file, specs_of(arrays), arrays.values(), streaming)
    ours, theirs = (tmp_path / "ours").read_bytes(), (tmp_path / "theirs").read_bytes()
    assert ours == theirs


def test_arrays_beyond_4_gb_are_refused():
    specs = {("lm_head", "kernel"): ((1 << 16, 1 << 15), "float32")}
    with pytest.raises(ValueError, match=r"lm_head/kernel .* at most 4 GB"):
        msgpack_files.size(specs)


@pytest.mark.parametrize("write", [write_as_easylm, write_as_flax])
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
