"""Safetensors files: a length, a JSON header, and the tensors' bytes.

Read and written here rather than with the `safetensors` library, which cannot give
bfloat16 to NumPy without copying, nor say where in the file a tensor lies, and writes
only what is in memory whole.

Source: https://github.com/huggingface/safetensors#format
"""

import json

from keras_openllama.checkpoints import array_io
from keras_openllama.checkpoints.tensors import (
    MappedFile,
    MappedTensor,
    contiguous_strides,
    dense_bytes,
    is_shape,
    is_size,
)

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
_ALIGNMENT = 8  # The reference implementation pads the header to as many bytes.
_LARGEST_HEADER = 100_000_000  # The limit of the reference implementation.


def read(path):
    """Describes the tensors of a safetensors file; no tensor is read yet.

    Args:
        path: path of the file.

    Returns:
        Dict of `StoredTensor` by name, in the order of their bytes.

    Raises:
        OSError: if the file cannot be opened.
        ValueError: if the file is truncated or damaged. The message names the file.

    Example:

    ```python
    tensors = safetensors.read("model.safetensors")
    tensors["model.norm.weight"].array()
    ```
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
    if header_length > _LARGEST_HEADER or data_start > file.size:
        raise ValueError(f"its header would have {header_length:,} bytes")
    header = json.loads(
        file.bytes(_LENGTH_BYTES, header_length).decode("utf-8"),
        object_pairs_hook=_without_duplicates,
    )
    if not isinstance(header, dict):
        raise ValueError("its header is not a JSON object")
    header.pop("__metadata__", None)
    tensors = {}
    position = 0
    for name, entry in sorted(header.items(), key=_begin):
        dtype, shape, (begin, end) = _checked(name, entry)
        if begin != position:
            raise ValueError(f"{name} begins at {begin:,} where {position:,} is due")
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
        raise ValueError("its header names something twice")
    return result


def _begin(item):
    name, entry = item
    try:
        begin, end = entry["data_offsets"]
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"{name} has no data_offsets") from None
    return begin, end


def _checked(name, entry):
    begin, end = entry["data_offsets"]
    shape = entry.get("shape")
    if not is_shape(shape) or not is_size(begin) or not is_size(end):
        raise ValueError(f"{name} has an impossible shape or data_offsets")
    dtype = DTYPES.get(entry.get("dtype"))
    if dtype is None:
        raise ValueError(
            f"{name} has dtype {entry.get('dtype')}, and {', '.join(DTYPES)} are read"
        )
    if dense_bytes(shape, dtype) != end - begin:
        raise ValueError(f"{name}, {dtype} of shape {shape}, has {end - begin:,} bytes")
    return dtype, tuple(shape), (begin, end)


# ----- Writing


def size(specs):
    """Bytes of the file that `write` writes."""
    return len(_header(specs)) + tensor_bytes(specs)


def tensor_bytes(specs):
    """Bytes of the tensors alone."""
    return sum(dense_bytes(*spec) for spec in specs.values())


def write(file, specs, values):
    """Writes tensors, one at a time.

    Args:
        file: binary file, open for writing.
        specs: dict by name of `(shape, dtype)`.
        values: iterable of NumPy arrays, in the order of `specs`; each is cast.

    Raises:
        ValueError: if a value is beyond the range of float16.
        OSError: if the file cannot be written.

    Example:

    ```python
    with open("model.safetensors", "wb") as file:
        write(file, {"norm.weight": ((64,), "float16")}, [np.ones(64)])
    ```
    """
    file.write(_header(specs))
    for spec, value in zip(specs.values(), values, strict=True):
        array_io.write(file, value, *spec)


def _header(specs):
    codes = {dtype: code for code, dtype in DTYPES.items()}
    # transformers refuses a file that does not say so.
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
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text
