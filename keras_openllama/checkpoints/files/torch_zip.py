"""PyTorch's weight files (`.bin`, `.pt`, `.pth`), read without PyTorch.

Since PyTorch 1.6 `torch.save` writes a zip archive without compression: `NAME/data.pkl`
describes the tensors, `NAME/data/KEY` holds the elements of one storage. So a storage
is a range of the file and can be mapped.
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

_LOCAL_HEADER = struct.Struct("<4s2xHH16xHH")  # signature, flags, method, two lengths
_ENCRYPTED = 1
_LARGEST_PICKLE = 64 << 20  # That of a 13B model has 100 KB.
# How files begin that PyTorch wrote before 1.6: the pickle of a magic number.
_LEGACY_START = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."


def read(path):
    """Describes the tensors of a file written by `torch.save(state_dict, path)`.

    Nothing in the file is executed, and no tensor is read yet.

    Args:
        path: path of the file.

    Returns:
        Dict of `StoredTensor` by name, in the file's order.

    Raises:
        OSError: if the file cannot be opened.
        ValueError: if the file is truncated, damaged, compressed, in the format before
            PyTorch 1.6, or holds anything but tensors. The message names the file.

    Example:

    ```python
    tensors = torch_zip.read("pytorch_model.bin")
    tensors["model.norm.weight"].array()
    ```
    """
    file = MappedFile(path)
    try:
        return _read(file)
    except torch_pickle.RefusedPickle as error:
        raise ValueError(
            f"{file.path} is refused: its pickle asks for {error}, which a file of "
            "tensors has no need of. Nothing in it was run. Get the file from a source "
            "that you trust, or ask for a safetensors file."
        ) from None
    except Exception as error:
        # The parsers of zip and pickle raise a dozen types on damaged input.
        raise ValueError(
            f"{file.path} ({file.size:,} bytes) cannot be read as a PyTorch file: "
            f"{error or type(error).__name__}. {file.remedy}"
        ) from error


def _read(file):
    start = file.bytes(0, len(_LEGACY_START))
    if start == _LEGACY_START or file.bytes(257, 5) == b"ustar":
        raise ValueError(
            "it is in the format before PyTorch 1.6. Save it again with a current "
            "PyTorch: torch.save(torch.load(path, weights_only=True), path)"
        )
    if start[:2] != b"PK":
        raise ValueError("it is not a zip archive, as torch.save writes")
    try:
        archive = zipfile.ZipFile(file.path)
    except zipfile.BadZipFile:
        raise ValueError("the end of the archive is missing") from None
    with archive:
        entries = _entries(archive)
        described = _described(archive, entries)
    spans = {}
    tensors = {}
    for name, tensor in described.items():
        key = tensor.storage.key
        if key not in spans:
            spans[key] = _span(file, entries, f"data/{key}")
        tensors[name] = _stored(file, name, tensor, *spans[key])
    return tensors


def _entries(archive):
    """The archive's entries by name, without the folder that holds them all."""
    infos = archive.infolist()
    pickles = [i.filename for i in infos if i.filename.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise ValueError(f"the archive has {len(pickles)} entries named data.pkl")
    folder = pickles[0].removesuffix("data.pkl")
    entries = {info.filename.removeprefix(folder): info for info in infos}
    if len(entries) != len(infos):
        raise ValueError("the archive has entries of the same name")
    return entries


def _described(archive, entries):
    if "byteorder" in entries:
        order = archive.read(entries["byteorder"]).decode("ascii", "replace")
        if order != sys.byteorder:
            raise ValueError(
                f"its byte order is {order!r} and this machine's {sys.byteorder!r}. "
                "Save it again on a machine like this one"
            )
    if entries["data.pkl"].file_size > _LARGEST_PICKLE:
        raise ValueError(f"its pickle has {entries['data.pkl'].file_size:,} bytes")
    described = torch_pickle.interpret(archive.read(entries["data.pkl"]))
    if not isinstance(described, dict):
        raise ValueError(
            f"it holds a {type(described).__name__}, not a dict of tensors"
        )
    for name, tensor in described.items():
        if not isinstance(name, str) or not isinstance(tensor, torch_pickle.Tensor):
            raise ValueError(
                f"its entry {name!r} is a {type(tensor).__name__}, not a tensor. Save "
                "model.state_dict() alone"
            )
    return described


def _span(file, entries, name):
    """Where an entry's bytes lie in the file: start and length."""
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
            f"entry {name} is compressed or encrypted; torch.save does neither. Write "
            "the file again with torch.save"
        )
    start += _LOCAL_HEADER.size
    if file.bytes(start, name_length) != entry.orig_filename.encode():
        raise ValueError(f"the header of entry {name} is damaged")
    start += name_length
    _check_extra_fields(file.bytes(start, extra_length), name)
    start += extra_length
    if start + entry.file_size > file.size:
        raise ValueError(f"entry {name} reaches beyond the end of the file")
    return start, entry.file_size


def _check_extra_fields(extra, name):
    """Extra fields fill their place exactly, or their length cannot be trusted."""
    while extra:
        length = 4 + int.from_bytes(extra[2:4], "little")
        if len(extra) < length:
            raise ValueError(f"the header of entry {name} is damaged")
        extra = extra[length:]


def _stored(file, name, tensor, start, length):
    storage = tensor.storage
    itemsize = numpy_dtype(storage.dtype).itemsize
    if storage.count * itemsize > length:
        raise ValueError(
            f"the storage of {name} has {length:,} bytes, and its {storage.count:,} "
            f"{storage.dtype} elements need {storage.count * itemsize:,}"
        )
    if tensor.offset + extent(tensor.shape, tensor.strides) > storage.count:
        raise ValueError(
            f"{name}, of shape {tensor.shape} with strides {tensor.strides} from "
            f"element {tensor.offset}, reaches beyond its storage of "
            f"{storage.count:,} elements"
        )
    return MappedTensor(
        name=name,
        dtype=storage.dtype,
        shape=tensor.shape,
        strides=tensor.strides,
        offset=start + tensor.offset * itemsize,
        file=file,
    )
