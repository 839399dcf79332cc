"""`read_gguf` reads each type, and names file, tensor and type of damaged files."""

import struct

import gguf
import numpy as np
import pytest
from gguf_files import write_file

from keras_openllama.checkpoints.files.gguf_file import read_gguf

pytestmark = pytest.mark.backend_free

BLOCK_TYPES = [
    "Q4_0",
    "Q4_1",
    "Q5_0",
    "Q5_1",
    "Q8_0",
    "Q2_K",
    "Q3_K",
    "Q4_K",
    "Q5_K",
    "Q6_K",
    "IQ4_NL",
    "IQ4_XS",
]
METADATA = {"llama.block_count": 2, "general.name": "é\n", "x.list": [1.5, -2.0]}


def random_blocks(kind, rows=3, blocks=2):
    """Returns bytes of blocks whose scales are finite."""
    _, nbytes = gguf.GGML_QUANT_SIZES[kind]
    random = np.random.default_rng(0)
    return random.integers(0, 0x3C, (rows, blocks * nbytes), "uint8")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.gguf"


@pytest.fixture
def small_file(path):
    kind = gguf.GGMLQuantizationType.Q8_0
    tensors = {
        "first": np.ones((2, 3), "float32"),
        "blocks": (random_blocks(kind), kind),
    }
    write_file(path, METADATA, tensors)
    return path


def replace_bytes(path, old, new):
    data = path.read_bytes()
    assert data.count(old) == 1
    path.write_bytes(data.replace(old, new))


def test_read_gguf_returns_metadata(small_file):
    metadata = read_gguf(small_file).metadata
    assert metadata == {"general.architecture": "llama", **METADATA}


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_read_gguf_dequantizes_like_the_gguf_package(name, path):
    kind = gguf.GGMLQuantizationType[name]
    blocks = random_blocks(kind)
    write_file(path, {}, {"other": np.ones(5, "float32"), "x": (blocks, kind)})
    stored = read_gguf(path).tensors["x"]
    expected = gguf.dequantize(blocks, kind)
    assert np.isfinite(expected).all() and np.abs(expected).max() > 0
    assert (stored.type, stored.dtype, stored.shape) == (
        name,
        "float32",
        expected.shape,
    )
    assert stored.nbytes == blocks.nbytes
    assert np.array_equal(stored.array(), expected)


@pytest.mark.parametrize("name, dtype", [("F32", "float32"), ("F16", "float16")])
def test_read_gguf_maps_floats(name, dtype, path):
    values = np.arange(6, dtype=dtype).reshape(2, 3)
    write_file(path, {}, {"x": values})
    stored = read_gguf(path).tensors["x"]
    assert stored.dtype == dtype
    assert np.array_equal(stored.array(), values)


def test_read_gguf_maps_bfloat16(path):
    values = np.arange(64, dtype="float32").reshape(2, 32)
    kind = gguf.GGMLQuantizationType.BF16
    write_file(path, {}, {"x": (gguf.quantize(values, kind), kind)})
    stored = read_gguf(path).tensors["x"]
    assert stored.dtype == "bfloat16"
    assert np.array_equal(stored.array().astype("float32"), values)


def test_read_gguf_rejects_a_file_that_was_cut_anywhere(small_file, tmp_path):
    data = small_file.read_bytes()
    cut = tmp_path / "cut.gguf"
    end = max(t.offset + t.nbytes for t in read_gguf(small_file).tensors.values())
    for length in range(1, end, 3):
        cut.write_bytes(data[:length])
        with pytest.raises(ValueError, match=r"cut\.gguf .*download it again"):
            read_gguf(cut)
    cut.write_bytes(b"")
    with pytest.raises(ValueError, match=r"cut\.gguf is empty"):
        read_gguf(cut)


def test_read_gguf_names_the_tensor_at_which_a_file_ends(small_file):
    data = small_file.read_bytes()
    small_file.write_bytes(data[:-40])
    message = r"before or inside the tensor blocks \(Q8_0, shape \(3, 64\)\)"
    with pytest.raises(ValueError, match=message):
        read_gguf(small_file)


def type_bytes(name, shape, kind):
    """Returns the entry of a tensor in the header, up to its type."""
    sizes = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
    return name.encode() + sizes + struct.pack("<I", kind)


@pytest.mark.parametrize(
    "kind, message",
    [
        (99, r"tensor blocks has the type 99, which version .* pip install --upgrade"),
        (
            9,
            r"tensor blocks has the type Q8_1, which .* cannot convert.*llama-quantize",
        ),
        (26, r"tensor blocks has the type I32, which .* cannot convert"),
        (
            12,
            r"tensor blocks of shape \(3, 64\) has the type Q4_K, whose blocks of 256",
        ),
    ],
)
def test_read_gguf_names_a_type_that_it_cannot_read(kind, message, small_file):
    entry = "blocks", (3, 64)
    replace_bytes(small_file, type_bytes(*entry, 8), type_bytes(*entry, kind))
    with pytest.raises(ValueError, match=rf"model\.gguf .*{message}"):
        read_gguf(small_file)


def test_read_gguf_rejects_invalid_shapes(small_file):
    entry = type_bytes("blocks", (3, 64), 8)
    for shape in [(0, 64), (3, 1 << 63), (1 << 40, 64)]:
        changed = small_file.with_name("changed.gguf")
        changed.write_bytes(small_file.read_bytes())
        replace_bytes(changed, entry, type_bytes("blocks", shape, 8))
        with pytest.raises(ValueError, match="the tensor blocks"):
            read_gguf(changed)


@pytest.mark.parametrize(
    "position, value, message",
    [
        (0, b"GGML", "does not begin with 'GGUF'"),
        (4, struct.pack("<I", 77), "version 77"),
        (4, struct.pack(">I", 3), "other byte order|inside its header"),
        (8, struct.pack("<Q", 1 << 60), "inside its header"),
        (16, struct.pack("<Q", 1 << 60), "inside its header|not a valid"),
    ],
)
def test_read_gguf_rejects_a_damaged_header(position, value, message, small_file):
    data = bytearray(small_file.read_bytes())
    data[position : position + len(value)] = value
    small_file.write_bytes(data)
    with pytest.raises(
        ValueError, match=rf"cannot be read as a GGUF file.*({message})"
    ):
        read_gguf(small_file)


def test_read_gguf_rejects_one_part_of_a_model(path):
    write_file(path, {"split.count": 3}, {"x": np.ones(4, "float32")})
    with pytest.raises(ValueError, match=r"one of 3 parts.*llama-gguf-split --merge"):
        read_gguf(path)
