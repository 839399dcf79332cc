"""Writes msgpack files of EasyLM and Flax, one array at a time.

The bytes around the arrays are computed first, so that the arrays can be streamed. See
`msgpack` for the formats.
"""

import itertools
import struct
from collections.abc import Iterable, Iterator, Mapping
from typing import BinaryIO

from numpy.typing import NDArray

from keras_openllama.checkpoints import array_io
from keras_openllama.checkpoints.files.msgpack import ARRAY, FORMATS
from keras_openllama.checkpoints.tensors import dense_bytes

# The largest length of 32 bits, less space for the headers inside an extension.
_MAX_ARRAY_BYTES = (1 << 32) - 1024

# Shape and dtype of each array, by key.
ArraySpecs = Mapping[tuple[str, ...], tuple[tuple[int, ...], str]]


def array_headers(
    specs: ArraySpecs, streaming: bool = True
) -> Iterator[tuple[bytes, tuple[str, ...]]]:
    """Yields the bytes that precede the elements of each array in a file.

    Args:
        specs: Shape and dtype of each array, by key.
        streaming: Whether the file is EasyLM's stream of records rather than Flax's
            nested map.

    Yields:
        `(header, key)`: the bytes, and the key of the array whose elements follow.

    Raises:
        ValueError: If an array is too large for msgpack.
    """
    if streaming:
        for key, (shape, dtype) in specs.items():
            array = _array_header(key, shape, dtype)
            length = len(array) + dense_bytes(shape, dtype)
            yield b"\x92" + _key(key) + _header("bin", length) + array, key
    else:
        yield from _map_headers(specs, 0)


def msgpack_size(specs: ArraySpecs, streaming: bool = True) -> int:
    """Returns the size in bytes of the file that `write_msgpack` writes.

    Args:
        specs: Shape and dtype of each array, by key.
        streaming: As for `array_headers`.

    Returns:
        The size of headers and arrays.

    Example:
        >>> msgpack_size({("ln_f", "kernel"): ((64,), "float32")})
        291
    """
    headers = sum(len(header) for header, _ in array_headers(specs, streaming))
    return headers + sum(itertools.starmap(dense_bytes, specs.values()))


def write_msgpack(
    file: BinaryIO,
    specs: ArraySpecs,
    values: Iterable[NDArray],
    streaming: bool = True,
) -> None:
    """Writes a file, one array at a time.

    Args:
        file: Binary file that is open for writing.
        specs: Shape and dtype of each array, by key.
        values: The arrays in the order of `specs`. Each is cast to its dtype.
        streaming: As for `array_headers`.

    Raises:
        ValueError: If an array is too large for msgpack, or a value exceeds the range
            of its dtype.
        OSError: If the file cannot be written.

    Example:
        >>> import numpy as np
        >>> specs = {("ln_f", "kernel"): ((64,), "float32")}
        >>> with open("params", "wb") as file:
        ...     write_msgpack(file, specs, [np.ones(64)])
    """
    headers = array_headers(specs, streaming)
    for (header, key), value in zip(headers, values, strict=True):
        file.write(header)
        array_io.write_array(file, value, *specs[key])


def _map_headers(specs, depth):
    """Yields the headers of a nested map whose keys share `depth` leading names."""
    groups = itertools.groupby(specs.items(), key=lambda item: item[0][depth])
    children = {name: dict(items) for name, items in groups}
    if sum(map(len, children.values())) != len(specs):
        raise ValueError("keys with a common prefix must be adjacent")
    header = _header("map", len(children))
    for name, inner in children.items():
        header += _string(name)
        first = next(iter(inner))
        if len(first) == depth + 1:
            yield header + _array_header(first, *inner[first]), first
            header = b""
            continue
        for inner_header, key in _map_headers(inner, depth + 1):
            yield header + inner_header, key
            header = b""


def _key(key):
    return _header("list", len(key)) + b"".join(map(_string, key))


def _string(text):
    data = text.encode("utf-8")
    return _header("str", len(data)) + data


def _array_header(key, shape, dtype):
    """Returns the extension of an array without its elements."""
    nbytes = dense_bytes(shape, dtype)
    if nbytes > _MAX_ARRAY_BYTES:
        raise ValueError(
            f"{'/'.join(key)} has {nbytes:,} bytes, and msgpack stores at most 4 GB in "
            "one array. Use a smaller dtype."
        )
    inner = b"\x93" + _header("list", len(shape))
    inner += b"".join(map(_number, shape)) + _string(dtype) + _header("bin", nbytes)
    return _header("ext", len(inner) + nbytes) + struct.pack(">b", ARRAY) + inner


def _number(value):
    return struct.pack("B", value) if value < 0x80 else _shortest("number", value)


def _header(kind, length):
    """Returns the shortest header of a string, bytes, list, map or extension."""
    short = {"str": (0xA0, 32), "list": (0x90, 16), "map": (0x80, 16)}
    if kind in short and length < short[kind][1]:
        return struct.pack("B", short[kind][0] + length)
    return _shortest(kind, length)


def _shortest(kind, number):
    """Returns the type byte of a kind and a number in the fewest possible bytes."""
    for first, (other, code) in FORMATS.items():
        if other == kind and code in "BHI" and number < 1 << 8 * struct.calcsize(code):
            return struct.pack(f">B{code}", first, number)
    raise ValueError(f"{number:,} is too large for msgpack")
