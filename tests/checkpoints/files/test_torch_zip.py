"""`read_torch_file` reads PyTorch files exactly, and executes nothing in them."""

import collections
import os
import pickle
import struct
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch

from keras_openllama.checkpoints.files import torch_zip
from keras_openllama.checkpoints.tensors import numpy_dtype

pytestmark = pytest.mark.backend_free


def saved(tmp_path, value, **options):
    path = tmp_path / "weights.bin"
    torch.save(value, path, **options)
    return path


def as_numpy(tensor):
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(numpy_dtype("bfloat16"))
    return tensor.numpy()


def archive(tmp_path, program, **entries):
    """Writes an archive like torch.save, with a custom pickle."""
    path = tmp_path / "weights.bin"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", program)
        for name, data in {"data/0": bytes(64), **entries}.items():
            file.writestr(f"archive/{name}", data)
    return path


# ----- Reading


@pytest.mark.parametrize(
    "dtype",
    ["float16", "bfloat16", "float32", "float64"]
    + ["int8", "uint8", "int16", "int32", "int64", "bool"],
)
def test_read_torch_file_reads_every_dtype_bit_exactly(tmp_path, dtype):
    tensor = (100 * torch.randn(5, 7)).to(getattr(torch, dtype))
    stored = torch_zip.read_torch_file(saved(tmp_path, {"x": tensor}))["x"]
    assert stored.dtype == dtype
    assert stored.shape == (5, 7)
    assert stored.array().tobytes() == as_numpy(tensor).tobytes()


def test_read_torch_file_reads_views_with_strides_and_offsets(tmp_path):
    full = torch.arange(120.0).reshape(4, 5, 6)
    views = {
        "full": full,
        "transposed": full.transpose(0, 2),
        "part": full[1:3, ::2, 3:],
        "row": full[2, 3],
        "repeated": full[0, 0, :1].expand(3, 4),
        "number": torch.tensor(7.0),
        "empty": torch.zeros(0, 3),
    }
    tensors = torch_zip.read_torch_file(saved(tmp_path, views))
    assert list(tensors) == list(views)
    for name, view in views.items():
        np.testing.assert_array_equal(tensors[name].array(), view.numpy())


def test_read_torch_file_maps_a_shared_storage_once(tmp_path):
    tensor = torch.randn(3, 4)
    tensors = torch_zip.read_torch_file(saved(tmp_path, {"a": tensor, "b": tensor[1:]}))
    assert tensors["b"].offset == tensors["a"].offset + 4 * tensor.itemsize


def test_read_torch_file_reads_a_state_dict_with_parameters_and_metadata(tmp_path):
    module = torch.nn.Linear(3, 2)
    parameters = collections.OrderedDict(module.named_parameters())
    for value in (module.state_dict(), parameters):
        tensors = torch_zip.read_torch_file(saved(tmp_path, value))
        weight = module.weight.detach().numpy()
        np.testing.assert_array_equal(tensors["weight"].array(), weight)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_read_torch_file_reads_every_pickle_protocol(tmp_path, protocol):
    path = saved(tmp_path, {"x": torch.ones(3)}, pickle_protocol=protocol)
    assert torch_zip.read_torch_file(path)["x"].array().tolist() == [1, 1, 1]


def test_read_torch_file_does_not_copy(tmp_path):
    path = saved(tmp_path, {"x": torch.zeros(1000)})
    array = torch_zip.read_torch_file(path)["x"].array()
    assert not array.flags.writeable
    assert not array.flags.owndata


def test_read_torch_file_does_not_import_torch(tmp_path):
    path = saved(tmp_path, {"x": torch.ones(3)})
    program = (
        "import sys; sys.modules['torch'] = sys.modules['keras'] = None\n"
        "from keras_openllama.checkpoints.files import torch_zip\n"
        f"print(torch_zip.read_torch_file({str(path)!r})['x'].array().sum())"
    )
    result = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "KERAS_BACKEND": "jax"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout == "3.0\n"


# ----- Security


class Payload:
    """An object whose pickle is a function call."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


def text(value):
    return b"X" + struct.pack("<I", len(value)) + value.encode()


# Each creates a file in the working directory when it is unpickled.
TOUCH = Payload(os.system, "touch ran")
HARMFUL = {
    "reduce": pickle.dumps(TOUCH, 2),
    "stack_global": pickle.dumps(TOUCH, 4),
    "in_a_dict": pickle.dumps({"x": TOUCH}, 2),
    "eval": pickle.dumps(Payload(eval, "open('ran', 'w')"), 2),
    "exec": pickle.dumps(Payload(exec, "open('ran', 'w')"), 4),
    "nested": pickle.dumps(Payload(list, Payload(map, os.system, ["touch ran"])), 2),
    "getattr": b"\x80\x02c__builtin__\ngetattr\nc__builtin__\n__import__\n"
    + text("os") + b"\x85R" + text("system") + b"\x86R" + text("touch ran")
    + b"\x85R.",
    "inst": b"(S'touch ran'\nios\nsystem\n.",
    "obj": b"\x80\x02(csubprocess\nPopen\n(" + text("touch") + text("ran") + b"lo.",
    "newobj": b"\x80\x02cbuiltins\nexec\n" + text("open('ran', 'w')") + b"\x85R.",
    "build": b"\x80\x02ctypes\nSimpleNamespace\n)R}" + text("x")
    + b"cos\nsystem\n" + text("touch ran") + b"\x85Rsb.",
    "metadata": b"\x80\x02ccollections\nOrderedDict\n)R}" + text("x")
    + b"cos\nsystem\n" + text("touch ran") + b"\x85Rsb.",
    "after_a_tensor": b"\x80\x02}(" + text("a") + b"K\x01" + text("b")
    + b"cos\nsystem\n" + text("touch ran") + b"\x85Ru.",
}  # fmt: skip

# Harmless, but not part of a file of tensors.
FOREIGN = {
    "extension": b"\x80\x02\x82\x01.",
    "persistent_id": b"Pcos\nsystem\n\n.",
    "dotted_name": b"\x80\x04" + text("torch") + text("_utils.os.system") + b"\x93.",
    "name_split_elsewhere": b"\x80\x02ctorch._utils._rebuild_tensor_v2\n\n.",
    "import_of_torch": b"\x80\x02ctorch._utils\n_import_dotted_name\n.",
    "call_of_a_storage": b"\x80\x02ctorch\nFloatStorage\n)R.",
    "attributes_of_a_function": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}b.",
    "tuple_as_key": b"\x80\x02}K\x01\x85K\x02s.",
}


@pytest.mark.parametrize("attack", HARMFUL)
def test_read_torch_file_rejects_a_pickle_that_executes_code(
    tmp_path, monkeypatch, attack
):
    monkeypatch.chdir(tmp_path)
    path = archive(tmp_path, HARMFUL[attack])
    with pytest.raises(ValueError) as error:
        torch_zip.read_torch_file(path)
    assert str(path) in str(error.value)
    assert "rejected" in str(error.value)
    assert not os.path.exists("ran")


@pytest.mark.parametrize("attack", HARMFUL)
def test_attacks_execute_code_when_unpickled(tmp_path, monkeypatch, attack):
    monkeypatch.chdir(tmp_path)
    value = pickle.loads(HARMFUL[attack])
    if isinstance(value, subprocess.Popen):
        value.wait()
    assert os.path.exists("ran")


@pytest.mark.parametrize("program", FOREIGN)
def test_read_torch_file_rejects_anything_but_tensors(tmp_path, program):
    with pytest.raises(ValueError, match=r"weights\.bin"):
        torch_zip.read_torch_file(archive(tmp_path, FOREIGN[program]))


def test_read_torch_file_names_the_function_that_the_pickle_uses(tmp_path):
    path = archive(tmp_path, HARMFUL["eval"])
    with pytest.raises(ValueError, match=r"uses `__builtin__\.eval`.*safetensors"):
        torch_zip.read_torch_file(path)


def test_read_torch_file_rejects_a_pickled_module(tmp_path):
    with pytest.raises(ValueError, match=r"uses `torch\.nn\.modules\.linear\.Linear`"):
        torch_zip.read_torch_file(saved(tmp_path, torch.nn.Linear(2, 2)))


def test_read_torch_file_does_not_hash_nested_tuples(tmp_path):
    doubled = b")" + b"q\x00h\x00\x86" * 60  # (((), ()), ((), ())) … 60 levels deep
    with pytest.raises(ValueError, match="dict key of type tuple"):
        torch_zip.read_torch_file(
            archive(tmp_path, b"\x80\x02}" + doubled + b"K\x01s.")
        )


# ----- Damaged and unsupported files


def tensor_program(count=4, offset=0, shape=(4,), strides=(1,), key="0"):
    """Returns the pickle of one float32 tensor with the given sizes."""

    def numbers(values):
        parts = [b"\x8a\x08" + struct.pack("<q", value) for value in values]
        return b"(" + b"".join(parts) + b"t"

    storage = (
        b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text(key) + text("cpu")
        + numbers([count])[1:-1] + b"tQ"
    )  # fmt: skip
    return (
        b"\x80\x02}" + text("x") + b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage
        + numbers([offset])[1:-1] + numbers(shape) + numbers(strides)
        + b"\x89ccollections\nOrderedDict\n)RtRs."
    )  # fmt: skip


def test_read_torch_file_reads_the_handmade_tensor(tmp_path):
    data = np.arange(16, dtype="float32")
    path = archive(tmp_path, tensor_program(16, 2, (2, 3), (1, 4)), **{"data/0": data})
    np.testing.assert_array_equal(
        torch_zip.read_torch_file(path)["x"].array(), [[2, 6, 10], [3, 7, 11]]
    )


@pytest.mark.parametrize(
    "sizes, message",
    [
        ({"count": 17}, "64 bytes, but its 17"),
        ({"offset": 13, "count": 16}, "extends beyond its storage of 16"),
        ({"shape": (5,)}, "extends beyond its storage of 4"),
        ({"shape": (3,), "strides": (2,)}, "extends beyond its storage"),
        ({"shape": (2, 2)}, r"shape \(2, 2\) and strides \(1,\)"),
        ({"shape": (-1,)}, "-1"),
        ({"strides": (-1,)}, "-1"),
        ({"offset": -4}, "-4"),
        ({"shape": (2**62 - 1,), "strides": (2**62 - 1,)}, "extends beyond"),
        ({"key": "1"}, "no entry data/1"),
        ({"key": "../0"}, "no entry"),
    ],
)
def test_read_torch_file_rejects_sizes_beyond_the_storage(tmp_path, sizes, message):
    path = archive(tmp_path, tensor_program(**sizes))
    with pytest.raises(ValueError, match=rf"weights\.bin.*{message}"):
        torch_zip.read_torch_file(path)


def test_read_torch_file_rejects_compressed_entries(tmp_path):
    path = tmp_path / "weights.bin"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data.pkl", tensor_program())
        file.writestr("archive/data/0", bytes(64))
    with pytest.raises(ValueError, match=r"weights\.bin.*compressed"):
        torch_zip.read_torch_file(path)


def test_read_torch_file_rejects_the_other_byte_order(tmp_path):
    other = {"little": "big", "big": "little"}[sys.byteorder]
    path = archive(tmp_path, tensor_program(), byteorder=other)
    with pytest.raises(ValueError, match=f"weights.bin.*byte order is '{other}'"):
        torch_zip.read_torch_file(path)


def test_read_torch_file_rejects_the_format_before_pytorch_1_6(tmp_path):
    path = saved(tmp_path, {"x": torch.ones(2)}, _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match=r"before PyTorch 1\.6.*weights_only=True"):
        torch_zip.read_torch_file(path)


@pytest.mark.parametrize(
    "value, message",
    [
        ([torch.ones(2)], "contains a list"),
        ({"state_dict": {"x": torch.ones(2)}}, "'state_dict' is of type dict"),
        ({"step": 3}, "'step' is of type int"),
    ],
)
def test_read_torch_file_rejects_other_objects_than_a_dict_of_tensors(
    tmp_path, value, message
):
    with pytest.raises(ValueError, match=message):
        torch_zip.read_torch_file(saved(tmp_path, value))


@pytest.mark.parametrize("content", [b"", b"PK", b"not an archive", bytes(4096)])
def test_read_torch_file_rejects_files_that_are_not_archives(tmp_path, content):
    path = tmp_path / "weights.bin"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"weights\.bin"):
        torch_zip.read_torch_file(path)


def test_read_torch_file_raises_os_error_for_a_missing_file(tmp_path):
    with pytest.raises(OSError, match=r"missing\.bin"):
        torch_zip.read_torch_file(tmp_path / "missing.bin")


def complete_file(tmp_path):
    tensors = {"a": torch.randn(8, 16), "b": torch.randn(100).half()}
    path = saved(tmp_path, tensors)
    expected = {name: as_numpy(tensor) for name, tensor in tensors.items()}
    return path, path.read_bytes(), expected


def test_read_torch_file_names_a_truncated_file(tmp_path):
    path, data, _ = complete_file(tmp_path)
    for length in range(1, len(data), 7):
        path.write_bytes(data[:length])
        with pytest.raises(ValueError, match=r"weights\.bin.*download it again"):
            torch_zip.read_torch_file(path)


def test_read_torch_file_detects_flipped_bytes_or_keeps_all_sizes(tmp_path):
    path, data, expected = complete_file(tmp_path)
    rejected = 0
    for position in range(len(data)):
        damaged = bytearray(data)
        damaged[position] ^= 0xFF
        path.write_bytes(damaged)
        try:
            tensors = torch_zip.read_torch_file(path)
        except ValueError as error:
            rejected += 1
            assert str(path) in str(error)
            continue
        # The byte was part of a date, a name, or a tensor value.
        arrays = {name: stored.array() for name, stored in tensors.items()}
        differing = sum(
            arrays[name].tobytes() != value.tobytes()
            for name, value in expected.items()
        )
        assert [a.shape for a in arrays.values()] == [(8, 16), (100,)]
        assert differing <= 1
    assert rejected > 100
