"""EasyLM's and Flax's files are written as the libraries write and read them."""

import io

import flax.serialization
import flax.traverse_util
import msgpack
import numpy as np
import pytest
from easylm_files import DTYPES, some_arrays, write_map, write_stream

from keras_openllama.checkpoints.files import msgpack_writer

pytestmark = pytest.mark.backend_free


def specs_of(arrays):
    return {key: (a.shape, a.dtype.name) for key, a in arrays.items()}


@pytest.mark.parametrize("dtype", DTYPES)
def test_msgpack_and_flax_read_the_stream_that_is_written(tmp_path, dtype):
    arrays = some_arrays()
    specs = {key: (shape, dtype) for key, (shape, _) in specs_of(arrays).items()}
    with open(tmp_path / "file", "wb") as file:
        msgpack_writer.write(file, specs, arrays.values())
    data = (tmp_path / "file").read_bytes()
    assert len(data) == msgpack_writer.size(specs)
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
        msgpack_writer.write(file, specs, arrays.values(), streaming=False)
    data = (tmp_path / "file").read_bytes()
    assert len(data) == msgpack_writer.size(specs, streaming=False)
    found = flax.traverse_util.flatten_dict(flax.serialization.msgpack_restore(data))
    assert found.keys() == arrays.keys()
    assert all(np.array_equal(found[key], array) for key, array in arrays.items())


@pytest.mark.parametrize("streaming", [True, False])
def test_the_bytes_are_those_of_the_libraries(tmp_path, streaming):
    arrays = dict(sorted(some_arrays().items()))  # As Flax sorts them.
    write = write_stream if streaming else write_map
    write(tmp_path / "theirs", arrays)
    with open(tmp_path / "ours", "wb") as file:
        msgpack_writer.write(file, specs_of(arrays), arrays.values(), streaming)
    ours, theirs = (tmp_path / "ours").read_bytes(), (tmp_path / "theirs").read_bytes()
    assert ours == theirs


def test_arrays_beyond_4_gb_are_refused():
    specs = {("lm_head", "kernel"): ((1 << 16, 1 << 15), "float32")}
    with pytest.raises(ValueError, match=r"lm_head/kernel .* at most 4 GB"):
        msgpack_writer.size(specs)
