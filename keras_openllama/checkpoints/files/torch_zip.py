"""Reads PyTorch's weight files (`.bin`, `.pt`, `.pth`) without PyTorch.

Since PyTorch 1.6 `torch.save` writes an uncompressed zip archive: `NAME/data.pkl`
describes the tensors, and `NAME/data/KEY` holds the elements of one storage. Therefore
a storage is a range of the file and can be memory-mapped.

Source: `torch/serialization.py` of PyTorch.
"""

import struct
import sys
import zipfile

from keras_openllama.checkpoints.files import torch_pickle
from keras_openllama.checkpoints.tensors import (
    MappedFile,
    MappedTensor,
    extent,
    numpy_dtype,
)
from keras_openllama.utils.types import PathLike

_LOCAL_HEADER = struct.Struct("<4s2xHH16xHH")  # signature, flags, method, two lengths
_ENCRYPTED = 1
_MAX_PICKLE_BYTES = 64 << 20  # The pickle of a 13B model has 100 KB.
# Files that PyTorch wrote before 1.6 begin with the pickle of a magic number.
_LEGACY_START = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."


def read_torch_file(path: PathLike) -> dict[str, MappedTensor]:
    """Opens a file that `torch.save(state_dict, path)` wrote and lists its tensors.

    It does not execute anything in the file, and does not read the tensors' values.

    Args:
        path: Path of the file.

    Returns:
        The tensors by name, in the order of the file.

    Raises:
        OSError: If the file cannot be opened.
        ValueError: If the file is truncated, damaged, compressed, in the format before
            PyTorch 1.6, or contains anything but tensors. The message names the file.

    Example:
        tensors = read_torch_file("pytorch_model.bin")
        tensors["model.norm.weight"].array()
    """
    file = MappedFile(path)
    try:
        return _read(file)
    except torch_pickle.UnsafePickleError as error:
        raise ValueError(
            f"{file.path} was rejected as unsafe: its pickle uses {error}, which a "
            "file of tensors does not need. Nothing in the file was executed. Download "
            "it from a source that you trust, or use a safetensors file."
        ) from None
    except Exception as error:
        # The zip and pickle parsers raise a dozen types of errors on damaged input.
        raise ValueError(
            f"{file.path} ({file.size:,} bytes) cannot be read as a PyTorch file: "
            f"{error or type(error).__name__}. {file.remedy}"
        ) from error


def _read(file):
    start = file.bytes(0, len(_LEGACY_START))
    if start == _LEGACY_START or file.bytes(257, 5) == b"ustar":
        raise ValueError(
            "it is in the format before PyTorch 1.6. Convert it with a current "
            "PyTorch: torch.save(torch.load(path, weights_only=True), path)"
        )
    if start[:2] != b"PK":
        raise ValueError("it is not a zip archive")
    try:
        archive = zipfile.ZipFile(file.path)
    except zipfile.BadZipFile:
        raise ValueError("the end of the archive is missing") from None
    with archive:
        entries = _entries(archive)
        views = _tensor_views(archive, entries)
    ranges = {}
    tensors = {}
    for name, view in views.items():
        key = view.storage.key
        if key not in ranges:
            ranges[key] = _byte_range(file, entries, f"data/{key}")
        tensors[name] = _mapped_tensor(file, name, view, *ranges[key])
    return tensors


def _entries(archive):
    """Returns the archive's entries by name, without the top-level folder."""
    infos = archive.infolist()
    pickles = [i.filename for i in infos if i.filename.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise ValueError(f"the archive has {len(pickles)} entries named data.pkl")
    folder = pickles[0].removesuffix("data.pkl")
    entries = {info.filename.removeprefix(folder): info for info in infos}
    if len(entries) != len(infos):
        raise ValueError("the archive has entries of the same name")
    return entries


def _tensor_views(archive, entries):
    if "byteorder" in entries:
        order = archive.read(entries["byteorder"]).decode("ascii", "replace")
        if order != sys.byteorder:
            raise ValueError(
                f"its byte order is {order!r}, but this machine's is "
                f"{sys.byteorder!r}. Save it on a machine with this byte order"
            )
    if entries["data.pkl"].file_size > _MAX_PICKLE_BYTES:
        raise ValueError(f"its pickle has {entries['data.pkl'].file_size:,} bytes")
    views = torch_pickle.interpret_pickle(archive.read(entries["data.pkl"]))
    if not isinstance(views, dict):
        raise ValueError(f"it contains a {type(views).__name__}, not a dict of tensors")
    for name, view in views.items():
        if not isinstance(name, str) or not isinstance(view, torch_pickle.TensorView):
            raise ValueError(
                f"its entry {name!r} is of type {type(view).__name__}, not a tensor. "
                "Save only model.state_dict()"
            )
    return views


def _byte_range(file, entries, name):
    """Returns the offset and the length in bytes of an entry."""
    if name not in entries:
        raise ValueError(f"the archive has no entry {name}")
    entry = entries[name]
    start = entry.header_offset
    header = file.bytes(start, _LOCAL_HEADER.size)
    signature, flags, method, name_length, extra_length = _LOCAL_HEADER.unpack(header)
    if signature != b"PK\x03\x04":
        raise ValueError(f"the header of entry {name} is damaged")
    compressed = method != zipfile.ZIP_STORED or entry.compress_type != method
    if compressed or entry.compress_size != entry.file_size or flags & _ENCRYPTED:
        raise ValueError(
            f"entry {name} is compressed or encrypted, which is not supported. Save "
            "the file with torch.save"
        )
    start += _LOCAL_HEADER.size
    if file.bytes(start, name_length) != entry.orig_filename.encode():
        raise ValueError(f"the header of entry {name} is damaged")
    start += name_length
    _check_extra_fields(file.bytes(start, extra_length), name)
    start += extra_length
    if start + entry.file_size > file.size:
        raise ValueError(f"entry {name} extends beyond the end of the file")
    return start, entry.file_size


def _check_extra_fields(extra, name):
    """Checks that extra fields have exactly the length that the header states."""
    while extra:
        length = 4 + int.from_bytes(extra[2:4], "little")
        if len(extra) < length:
            raise ValueError(f"the header of entry {name} is damaged")
        extra = extra[length:]


def _mapped_tensor(file, name, view, start, length):
    storage = view.storage
    itemsize = numpy_dtype(storage.dtype).itemsize
    if storage.count * itemsize > length:
        raise ValueError(
            f"the storage of {name} has {length:,} bytes, but its {storage.count:,} "
            f"{storage.dtype} elements need {storage.count * itemsize:,}"
        )
    if view.offset + extent(view.shape, view.strides) > storage.count:
        raise ValueError(
            f"{name}, of shape {view.shape} with strides {view.strides} from "
            f"element {view.offset}, extends beyond its storage of "
            f"{storage.count:,} elements"
        )
    return MappedTensor(
        name=name,
        dtype=storage.dtype,
        shape=view.shape,
        strides=view.strides,
        offset=start + view.offset * itemsize,
        file=file,
    )
