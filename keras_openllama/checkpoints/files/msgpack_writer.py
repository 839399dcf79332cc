"""EasyLM's and Flax's msgpack files, written piece by piece.

What stands around the arrays is made first; their elements are written as they come,
so that none is in memory longer than it takes. See `msgpack` for the formats.
"""

import itertools
import struct

from keras_openllama.checkpoints import array_io
from keras_openllama.checkpoints.files.msgpack import ARRAY, FORMATS
from keras_openllama.checkpoints.tensors import dense_bytes

_LARGEST_ARRAY = (1 << 32) - 1024  # What a length can say, less room for the heads.


def pieces(specs, streaming=True):
    """What a file is made of: for each array what stands before its elements.

    Args:
        specs: dict by key, a tuple of strings, of `(shape, dtype)`.
        streaming: bool, EasyLM's stream of records rather than Flax's nested map.

    Yields:
        `(head, key)`: bytes, and the key of the array whose elements follow them.

    Raises:
        ValueError: if an array is larger than msgpack can hold.
    """
    if streaming:
        for key, (shape, dtype) in specs.items():
            array = _array_head(key, shape, dtype)
            length = len(array) + dense_bytes(shape, dtype)
            yield b"\x92" + _key(key) + _head("bin", length) + array, key
    else:
        yield from _map_pieces(specs, 0)


def size(specs, streaming=True):
    """Bytes of the file that `write` writes."""
    heads = sum(len(head) for head, _ in pieces(specs, streaming))
    return heads + sum(itertools.starmap(dense_bytes, specs.values()))


def write(file, specs, values, streaming=True):
    """Writes arrays, one at a time.

    Args:
        file: binary file, open for writing.
        specs, streaming: see `pieces`.
        values: iterable of NumPy arrays, in the order of `specs`; each is cast.

    Raises:
        ValueError: if an array is larger than msgpack can hold, or a value beyond the
            range of float16.
        OSError: if the file cannot be written.
    """
    for (head, key), value in zip(pieces(specs, streaming), values, strict=True):
        file.write(head)
        array_io.write(file, value, *specs[key])


def _map_pieces(specs, depth):
    """The pieces of the map of what follows a common part of the keys."""
    groups = itertools.groupby(specs.items(), key=lambda item: item[0][depth])
    children = {name: dict(items) for name, items in groups}
    if sum(map(len, children.values())) != len(specs):
        raise ValueError("keys that begin alike must stand together")
    head = _head("map", len(children))
    for name, inner in children.items():
        head += _string(name)
        first = next(iter(inner))
        if len(first) == depth + 1:
            yield head + _array_head(first, *inner[first]), first
            head = b""
            continue
        for more, key in _map_pieces(inner, depth + 1):
            yield head + more, key
            head = b""


def _key(key):
    return _head("list", len(key)) + b"".join(map(_string, key))


def _string(text):
    data = text.encode("utf-8")
    return _head("str", len(data)) + data


def _array_head(key, shape, dtype):
    """All of an array's extension but its elements."""
    nbytes = dense_bytes(shape, dtype)
    if nbytes > _LARGEST_ARRAY:
        raise ValueError(
            f"{'/'.join(key)} has {nbytes:,} bytes, and msgpack holds at most 4 GB in "
            "one array. Write it in a smaller dtype."
        )
    inner = b"\x93" + _head("list", len(shape))
    inner += b"".join(map(_number, shape)) + _string(dtype) + _head("bin", nbytes)
    return _head("ext", len(inner) + nbytes) + struct.pack(">b", ARRAY) + inner


def _number(value):
    return struct.pack("B", value) if value < 0x80 else _shortest("number", value)


def _head(kind, length):
    """The shortest head of a string, bytes, list, map or extension."""
    short = {"str": (0xA0, 32), "list": (0x90, 16), "map": (0x80, 16)}
    if kind in short and length < short[kind][1]:
        return struct.pack("B", short[kind][0] + length)
    return _shortest(kind, length)


def _shortest(kind, number):
    """The first byte of a kind and a number, in as few bytes as hold it."""
    for first, (other, code) in FORMATS.items():
        if other == kind and code in "BHI" and number < 1 << 8 * struct.calcsize(code):
            return struct.pack(f">B{code}", first, number)
    raise ValueError(f"{number:,} is more than msgpack can hold here")
