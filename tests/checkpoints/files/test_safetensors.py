"""`read_safetensors` reads files exactly, and names files that are damaged."""

import json

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch

from keras_openllama.checkpoints.files import safetensors as safetensors_files
from keras_openllama.checkpoints.tensors import numpy_dtype

pytestmark = pytest.mark.backend_free


def written(tmp_path, header, data=b"", length=None):
    """Writes a file with a custom header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    length = len(text) if length is None else length
    path = tmp_path / "model.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + text + data)
    return path


def entry(dtype="F32", shape=(2,), begin=0, end=8):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


@pytest.mark.parametrize("dtype", safetensors_files.DTYPES.values())
def test_read_safetensors_reads_every_dtype_bit_exactly(tmp_path, dtype):
    tensor = (100 * torch.randn(5, 7)).to(getattr(torch, dtype))
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file({"x": tensor}, path, {"format": "pt"})
    stored = safetensors_files.read_safetensors(path)["x"]
    assert (stored.dtype, stored.shape) == (dtype, (5, 7))
    expected = tensor.view(torch.uint8).numpy().tobytes()
    assert stored.array().tobytes() == expected


def test_read_safetensors_returns_tensors_by_name(tmp_path):
    tensors = {f"t{i}": np.full((i, 3), i, "float16") for i in range(5)}
    tensors["number"] = np.float32(7)
    path = tmp_path / "model.safetensors"
    safetensors.numpy.save_file({k: np.asarray(v) for k, v in tensors.items()}, path)
    read = safetensors_files.read_safetensors(path)
    assert set(read) == set(tensors)
    for name, value in tensors.items():
        np.testing.assert_array_equal(read[name].array(), value)


def test_read_safetensors_does_not_copy(tmp_path):
    path = tmp_path / "model.safetensors"
    safetensors.numpy.save_file({"x": np.zeros(1000)}, path)
    array = safetensors_files.read_safetensors(path)["x"].array()
    assert not array.flags.owndata
    assert not array.flags.writeable


def test_read_safetensors_reads_bfloat16_without_torch(tmp_path):
    data = np.arange(4).astype(numpy_dtype("bfloat16")).tobytes()
    path = written(tmp_path, {"x": entry("BF16", (4,))}, data)
    assert safetensors_files.read_safetensors(path)["x"].array().tolist() == [
        0,
        1,
        2,
        3,
    ]


@pytest.mark.parametrize(
    "header, data, message",
    [
        (b"{", b"", "Expecting"),
        (b"[]", b"", "not a JSON object"),
        (b"[" * 100_000, b"", ""),
        (b"\xff\xfe{}", b"", "utf-8"),
        (b'{"x": {}, "x": {}}', b"", "duplicate"),
        ({"x": 3}, b"", "no data_offsets"),
        ({"x": entry()}, bytes(7), "describes"),
        ({"x": entry()}, bytes(9), "describes"),
        ({"x": entry(end=12)}, bytes(12), "has 12 bytes"),
        ({"x": entry(begin=4, end=12)}, bytes(12), "begins at 4, expected 0"),
        ({"x": entry(), "y": entry()}, bytes(8), "begins at 0, expected 8"),
        ({"x": entry(shape=(-2,))}, bytes(8), "shape"),
        ({"x": entry(shape=(2.0,))}, bytes(8), "shape"),
        ({"x": entry(shape=(True, 2))}, bytes(8), "shape"),
        ({"x": entry(shape=(2**61, 8, 0), end=0)}, b"", None),
        ({"x": entry("F8_E4M3", (8,))}, bytes(8), "F8_E4M3.*BF16"),
    ],
)
def test_read_safetensors_names_a_file_with_a_damaged_header(
    tmp_path, header, data, message
):
    path = written(tmp_path, header, data)
    if message is None:
        assert safetensors_files.read_safetensors(path)["x"].nbytes == 0
        return
    with pytest.raises(ValueError, match=rf"model\.safetensors.*{message}"):
        safetensors_files.read_safetensors(path)


@pytest.mark.parametrize("length", [10**15, 10**8 - 1, 2**64 - 1])
def test_read_safetensors_names_a_file_shorter_than_its_header(tmp_path, length):
    path = written(tmp_path, {"x": entry()}, bytes(8), length)
    with pytest.raises(ValueError, match=r"model\.safetensors.*header"):
        safetensors_files.read_safetensors(path)


def test_read_safetensors_names_a_truncated_file(tmp_path):
    path = tmp_path / "model.safetensors"
    safetensors.numpy.save_file({"x": np.ones(9), "y": np.ones((2, 3))}, path)
    data = path.read_bytes()
    for length in range(len(data)):
        path.write_bytes(data[:length])
        with pytest.raises(ValueError, match=r"model\.safetensors"):
            safetensors_files.read_safetensors(path)


def test_read_safetensors_detects_flipped_bytes_in_the_header(tmp_path):
    path = tmp_path / "model.safetensors"
    safetensors.numpy.save_file({"x": np.ones(9), "y": np.ones((2, 3))}, path)
    data = path.read_bytes()
    rejected = 0
    header_end = len(data) - 15 * 8
    for position in range(header_end):
        for flip in (0xFF, 0x01):
            damaged = bytearray(data)
            damaged[position] ^= flip
            path.write_bytes(damaged)
            try:
                tensors = safetensors_files.read_safetensors(path)
            except ValueError as error:
                rejected += 1
                assert str(path) in str(error)
            else:
                assert sum(t.nbytes for t in tensors.values()) == 15 * 8
    assert rejected > header_end
