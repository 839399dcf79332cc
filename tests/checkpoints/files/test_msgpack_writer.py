"""`write_msgpack` writes the files that EasyLM and Flax write and read."""

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
def test_write_msgpack_writes_a_stream_that_msgpack_and_flax_read(tmp_path, dtype):
    arrays = some_arrays()
    specs = {key: (shape, dtype) for key, (shape, _) in specs_of(arrays).items()}
    with open(tmp_path / "file", "wb") as file:
        msgpack_writer.write_msgpack(file, specs, arrays.values())
    data = (tmp_path / "file").read_bytes()
    assert len(data) == msgpack_writer.msgpack_size(specs)
    found = {}
    for key, value in msgpack.Unpacker(io.BytesIO(data), max_buffer_size=0):
        shape, name, elements = msgpack.unpackb(msgpack.unpackb(value).data)
        array = np.frombuffer(elements, DTYPES[name]).reshape(shape)
        assert np.array_equal(array, flax.serialization.from_bytes(None, value))
        found[tuple(key)] = array
    assert found.keys() == arrays.keys()
    for key, array in arrays.items():
        assert np.array_equal(found[key], array.astype(DTYPES[dtype]))


def test_write_msgpack_writes_a_map_that_flax_reads(tmp_path):
    arrays = some_arrays("bfloat16")
    specs = specs_of(arrays)
    with open(tmp_path / "file", "wb") as file:
        msgpack_writer.write_msgpack(file, specs, arrays.values(), streaming=False)
    data = (tmp_path / "file").read_bytes()
    assert len(data) == msgpack_writer.msgpack_size(specs, streaming=False)
    found = flax.traverse_util.flatten_dict(flax.serialization.msgpack_restore(data))
    assert found.keys() == arrays.keys()
    assert all(np.array_equal(found[key], array) for key, array in arrays.items())


@pytest.mark.parametrize("streaming", [True, False])
def test_write_msgpack_writes_the_same_bytes_as_the_libraries(tmp_path, streaming):
    arrays = dict(sorted(some_arrays().items()))  # As Flax sorts them.
    write = write_stream if streaming else write_map
    write(tmp_path / "theirs", arrays)
    with open(tmp_path / "ours", "wb") as file:
        msgpack_writer.write_msgpack(file, specs_of(arrays), arrays.values(), streaming)
    ours, theirs = (tmp_path / "ours").read_bytes(), (tmp_path / "theirs").read_bytes()
    assert ours == theirs


def test_msgpack_size_rejects_arrays_of_more_than_4_gb():
    specs = {("lm_head", "kernel"): ((1 << 16, 1 << 15), "float32")}
    with pytest.raises(ValueError, match=r"lm_head/kernel .* at most 4 GB"):
        msgpack_writer.msgpack_size(specs)
