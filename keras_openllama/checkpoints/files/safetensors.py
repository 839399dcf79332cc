"""Reads and writes safetensors files: a length, a JSON header, and tensor data.

The `safetensors` library is not used because it copies bfloat16 tensors for NumPy, does
not report the offset of a tensor, and can only write tensors that are all in memory.

Source: https://github.com/huggingface/safetensors#format
"""

import json
from collections.abc import Iterable, Mapping
from typing import BinaryIO

from numpy.typing import NDArray

from keras_openllama.checkpoints import array_io
from keras_openllama.checkpoints.tensors import (
    MappedFile,
    MappedTensor,
    contiguous_strides,
    dense_bytes,
    is_shape,
    is_size,
)
from keras_openllama.utils.types import PathLike

DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
_LENGTH_BYTES = 8
# In bytes, of the first tensor, so that weights can be mapped (`loading.casting`). The
# reference implementation pads its header to 8 bytes.
_ALIGNMENT = 64
_MAX_HEADER_BYTES = 100_000_000  # The limit of the reference implementation.


def read_safetensors(path: PathLike) -> dict[str, MappedTensor]:
    """Opens a safetensors file and lists its tensors, without reading their values.

    Args:
        path: Path of the file.

    Returns:
        The tensors by name, in the order of their offsets.

    Raises:
        OSError: If the file cannot be opened.
        ValueError: If the file is truncated or damaged. The message names the file.

    Example:
        >>> import numpy as np
        >>> specs = {"norm.weight": ((3,), "float16")}
        >>> with open("model.safetensors", "wb") as file:
        ...     write_safetensors(file, specs, [np.ones(3)])
        >>> tensors = read_safetensors("model.safetensors")
        >>> tensors["norm.weight"].array()
        array([1., 1., 1.], dtype=float16)
    """
    file = MappedFile(path)
    try:
        return _read(file)
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{file.path} ({file.size:,} bytes) cannot be read as a safetensors file: "
            f"{error}. {file.remedy}"
        ) from error


def _read(file):
    header_length = int.from_bytes(file.bytes(0, _LENGTH_BYTES), "little")
    data_start = _LENGTH_BYTES + header_length
    if header_length > _MAX_HEADER_BYTES or data_start > file.size:
        raise ValueError(f"its header would take {header_length:,} bytes")
    header = json.loads(
        file.bytes(_LENGTH_BYTES, header_length).decode("utf-8"),
        object_pairs_hook=_without_duplicates,
    )
    if not isinstance(header, dict):
        raise ValueError("its header is not a JSON object")
    header.pop("__metadata__", None)
    tensors = {}
    position = 0
    for name, entry in sorted(header.items(), key=_offsets):
        dtype, shape, (begin, end) = _checked_entry(name, entry)
        if begin != position:
            raise ValueError(f"{name} begins at {begin:,}, expected {position:,}")
        position = end
        tensors[name] = MappedTensor(
            name, dtype, shape, contiguous_strides(shape), data_start + begin, file
        )
    if data_start + position != file.size:
        raise ValueError(f"its header describes {data_start + position:,} bytes")
    return tensors


def _without_duplicates(pairs):
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("its header has a duplicate key")
    return result


def _offsets(item):
    name, entry = item
    try:
        begin, end = entry["data_offsets"]
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"{name} has no data_offsets") from None
    return begin, end


def _checked_entry(name, entry):
    begin, end = entry["data_offsets"]
    shape = entry.get("shape")
    if not is_shape(shape) or not is_size(begin) or not is_size(end):
        raise ValueError(f"{name} has an invalid shape or invalid data_offsets")
    dtype = DTYPES.get(entry.get("dtype"))
    if dtype is None:
        raise ValueError(
            f"{name} has dtype {entry.get('dtype')}; supported dtypes are "
            f"{', '.join(DTYPES)}"
        )
    if dense_bytes(shape, dtype) != end - begin:
        raise ValueError(f"{name}, {dtype} of shape {shape}, has {end - begin:,} bytes")
    return dtype, tuple(shape), (begin, end)


# ----- Writing


# Shape and dtype of each tensor, by name.
TensorSpecs = Mapping[str, tuple[tuple[int, ...], str]]


def safetensors_size(specs: TensorSpecs) -> int:
    """Returns the size in bytes of the file that `write_safetensors` writes.

    Args:
        specs: Shape and dtype of each tensor, by name.

    Returns:
        The size of header and tensors.

    Example:
        >>> safetensors_size({"norm.weight": ((64,), "float16")})
        256
    """
    return len(_header(specs)) + tensor_bytes(specs)


def tensor_bytes(specs: TensorSpecs) -> int:
    """Returns the size in bytes of the tensors, without the header.

    Example:
        >>> tensor_bytes({"norm.weight": ((64,), "float16")})
        128
    """
    return sum(dense_bytes(*spec) for spec in specs.values())


def write_safetensors(
    file: BinaryIO, specs: TensorSpecs, values: Iterable[NDArray]
) -> None:
    """Writes a safetensors file, one tensor at a time.

    Args:
        file: Binary file that is open for writing.
        specs: Shape and dtype of each tensor, by name.
        values: The tensors in the order of `specs`. Each is cast to its dtype.

    Raises:
        ValueError: If a value exceeds the range of its dtype.
        OSError: If the file cannot be written.

    Example:
        >>> import numpy as np
        >>> specs = {"norm.weight": ((64,), "float16")}
        >>> with open("model.safetensors", "wb") as file:
        ...     write_safetensors(file, specs, [np.ones(64)])
    """
    file.write(_header(specs))
    for spec, value in zip(specs.values(), values, strict=True):
        array_io.write_array(file, value, *spec)


def aligned_first(specs: TensorSpecs) -> TensorSpecs:
    """Orders tensors so that most of them begin at a multiple of 64 bytes.

    The format allows no bytes between tensors, so one whose size is no multiple of 64
    moves all that follow it. Those come last.

    Args:
        specs: Shape and dtype of each tensor, by name.

    Example:
        >>> specs = {"norm": ((25,), "float32"), "matrix": ((25, 16), "float32")}
        >>> list(aligned_first(specs))
        ['matrix', 'norm']
    """

    def is_odd(item):
        return dense_bytes(*item[1]) % _ALIGNMENT != 0

    return dict(sorted(specs.items(), key=is_odd))


def _header(specs):
    codes = {dtype: code for code, dtype in DTYPES.items()}
    # Without this entry transformers does not load the file.
    header = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, (shape, dtype) in specs.items():
        end = position + dense_bytes(shape, dtype)
        header[name] = {
            "dtype": codes[dtype],
            "shape": list(shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(header, separators=(",", ":")).encode("utf-8")
    text += b" " * (-(_LENGTH_BYTES + len(text)) % _ALIGNMENT)
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text
