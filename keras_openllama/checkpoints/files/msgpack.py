"""Reads msgpack files of EasyLM and Flax, by memory-mapping their arrays.

EasyLM writes a stream of records `[key, bytes]`, where the key is a list of strings and
the bytes are Flax's msgpack encoding of one array. Flax itself writes one nested map of
arrays. An array is an extension of type 1 that contains `[shape, dtype, bytes]`. Flax
splits arrays of more than 1 GB into chunks.

The `msgpack` library is not used because it copies each array several times and does
not report the offset of an array in the file.

Sources: https://github.com/msgpack/msgpack/blob/master/spec.md,
https://github.com/young-geng/EasyLM/blob/main/EasyLM/checkpoint.py,
https://github.com/google/flax/blob/main/flax/serialization.py
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import struct
from typing import TYPE_CHECKING, Any

from keras_openllama.checkpoints.tensors import (
    JoinedTensor,
    MappedFile,
    MappedTensor,
    contiguous_strides,
    is_shape,
)
from keras_openllama.utils.types import PathLike

if TYPE_CHECKING:
    from keras_openllama.checkpoints.tensors import StoredTensor

ARRAY = 1  # Flax's extension type of an array.
_CHUNKED = "__msgpack_chunked_array__"
# Tests for other formats, which users may mistake for EasyLM's.
_OTHER_FORMATS = {
    "a safetensors file": lambda file: file.bytes(8, 1) == b"{",
    "a PyTorch file": lambda file: file.bytes(0, 2) == b"PK",
    "a JSON file": lambda file: file.bytes(0, 1) == b"{",
    "an HDF5 file of Keras": lambda file: file.bytes(1, 3) == b"HDF",
}
# The dtypes of Flax, and the size of an element in bytes.
_ITEMSIZES = {
    "bool": 1,
    **{f"{sign}int{8 * size}": size for sign in ("", "u") for size in (1, 2, 4, 8)},
    **{"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8},
    **{"complex64": 8, "complex128": 16},
}
# Heuristic: the largest number of values in a file. A train state of 13B has some ten
# thousand.
_MAX_VALUES = 1 << 20


def read_msgpack(path: PathLike) -> dict[tuple[str, ...], StoredTensor]:
    """Opens a file of EasyLM or Flax and lists its arrays, without reading them.

    Args:
        path: Path of the file.

    Returns:
        The arrays by key, a tuple of strings.

    Raises:
        OSError: If the file cannot be opened.
        ValueError: If the file is truncated, damaged or in another format. The message
            names the file.

    Example:
        tensors = read_msgpack("streaming_params")
        tensors["transformer", "wte", "embedding"].array()
    """
    file = MappedFile(path)
    try:
        return _read(file)
    except (ValueError, RecursionError) as error:
        other = next(
            (name for name, matches in _OTHER_FORMATS.items() if matches(file)), None
        )
        remedy = file.remedy
        if other:
            remedy = f"It looks like {other}: pass its directory instead."
        raise ValueError(
            f"{file.path} ({file.size:,} bytes) cannot be read as a msgpack file of "
            f"EasyLM: {error}. {remedy}"
        ) from error


def _read(file):
    reader = _Reader(file, 0, file.size)
    if _is_map(file.bytes(0, 1)[0]):
        leaves = _leaves(reader.value())
        if reader.position != file.size:
            raise ValueError(f"unexpected data after its map at {reader.position:,}")
    else:
        leaves = _records(reader)
    tensors = {}
    for key, leaf in leaves:
        if isinstance(leaf, (_Array, _ChunkedArray)):
            if key in tensors:
                raise ValueError(f"it contains {'/'.join(key)} twice")
            tensors[key] = leaf.stored("/".join(key), file)
    return tensors


def _is_map(first):
    return first >> 4 == 0x8 or first in (0xDE, 0xDF)


def _records(reader):
    """Yields key and value of each record of a stream."""
    while reader.position < reader.end:
        start = reader.position
        record = reader.value()
        if not isinstance(record, list) or len(record) != 2:
            raise ValueError(f"the value at byte {start:,} is not a pair [key, bytes]")
        key, value = record
        if not isinstance(key, list) or not all(map(_is_name, key)):
            raise ValueError(f"the key at byte {start:,} is not a list of strings")
        if not isinstance(value, _ByteRange):
            raise ValueError(f"the value of {'/'.join(key)} is not of type bytes")
        inner = reader.within(value)
        leaf = _chunked_or_node(inner.value())
        if inner.position != inner.end:
            raise ValueError(f"unexpected data after the value of {'/'.join(key)}")
        yield tuple(key), leaf


def _leaves(node, key=()):
    """Yields key and value of each leaf of a nested map."""
    node = _chunked_or_node(node)
    if not isinstance(node, dict):
        yield key, node
        return
    for name, child in node.items():
        if not _is_name(name):
            raise ValueError(f"its map has the invalid key {name!r}")
        yield from _leaves(child, (*key, name))


def _is_name(key):
    return isinstance(key, str) and "/" not in key


@dataclasses.dataclass(frozen=True)
class _ByteRange:
    """A range of the file."""

    start: int
    end: int


@dataclasses.dataclass(frozen=True)
class _Array:
    """An array in one range of the file that begins at `start`."""

    start: int
    shape: tuple[int, ...]
    dtype: str

    def stored(self, name, file):
        strides = contiguous_strides(self.shape)
        return MappedTensor(name, self.dtype, self.shape, strides, self.start, file)


@dataclasses.dataclass(frozen=True)
class _ChunkedArray:
    """An array in several chunks."""

    shape: tuple[int, ...]
    chunks: list[_Array]

    def stored(self, name, file):
        parts = [chunk.stored(name, file) for chunk in self.chunks]
        found = sum(math.prod(part.shape) for part in parts)
        if found != math.prod(self.shape) or len({part.dtype for part in parts}) != 1:
            raise ValueError(
                f"the chunks of {name} have {found:,} elements for shape {self.shape}"
            )
        return JoinedTensor(name, self.shape, parts)


def _chunked_or_node(node):
    """Converts Flax's map of a chunked array to a leaf; other nodes are unchanged."""
    if not isinstance(node, dict) or _CHUNKED not in node:
        return node
    shape, chunks = (_list_of(node.get(part)) for part in ("shape", "chunks"))
    if not is_shape(shape) or not chunks:
        raise ValueError("a chunked array has an invalid shape")
    if not all(isinstance(c, _Array) and len(c.shape) == 1 for c in chunks):
        raise ValueError("a chunk of an array is not one-dimensional")
    return _ChunkedArray(tuple(shape), chunks)


def _list_of(node):
    """Converts a list that Flax wrote as a map with the keys "0", "1" and so on."""
    if not isinstance(node, dict) or set(node) != set(map(str, range(len(node)))):
        raise ValueError("a chunked array has no shape or no chunks")
    return [node[str(i)] for i in range(len(node))]


# By first byte: the kind of value, and the struct format of its length or number.
FORMATS = {
    0xC4: ("bin", "B"),
    0xC5: ("bin", "H"),
    0xC6: ("bin", "I"),
    0xC7: ("ext", "B"),
    0xC8: ("ext", "H"),
    0xC9: ("ext", "I"),
    0xCA: ("number", "f"),
    0xCB: ("number", "d"),
    **{0xCC + i: ("number", code) for i, code in enumerate("BHIQbhiq")},
    0xD9: ("str", "B"),
    0xDA: ("str", "H"),
    0xDB: ("str", "I"),
    0xDC: ("list", "H"),
    0xDD: ("list", "I"),
    0xDE: ("map", "H"),
    0xDF: ("map", "I"),
}
_CONSTANTS = {0xC0: None, 0xC2: False, 0xC3: True}


class _Reader:
    """Parses msgpack between two positions of a file, without copying binary data."""

    def __init__(self, file, position, end, counter=None):
        self.file = file
        self.position = position
        self.end = end
        # Counts the values of this reader and of those that `within` returned.
        self._counter = itertools.count() if counter is None else counter

    def within(self, span: _ByteRange) -> _Reader:
        """Returns a reader of the msgpack in a range of bytes."""
        return _Reader(self.file, span.start, span.end, self._counter)

    def value(self) -> Any:
        """Parses the next value.

        Returns:
            `None`, bool, number, string, list or dict; `_Array` for an array;
            `_ByteRange` for bytes and other extensions.
        """
        if next(self._counter) > _MAX_VALUES:
            raise ValueError(f"it contains more than {_MAX_VALUES:,} values")
        first = self._unpack("B")
        if first < 0x80:
            return first
        if first >= 0xE0:
            return first - 0x100
        if first in _CONSTANTS:
            return _CONSTANTS[first]
        if first < 0xC0:  # Short values, with their length in the same byte.
            if first >= 0xA0:
                return self._string(first & 0x1F)
            kind = self._list if first >= 0x90 else self._map
            return kind(first & 0x0F)
        if 0xD4 <= first <= 0xD8:
            return self._extension(1 << (first - 0xD4))
        if first not in FORMATS:
            raise ValueError(f"byte {self.position - 1:,} is not valid msgpack")
        kind, code = FORMATS[first]
        number = self._unpack(code)
        if kind == "number":
            return number
        parse = {
            "bin": self._skip,
            "ext": self._extension,
            "str": self._string,
            "list": self._list,
            "map": self._map,
        }
        return parse[kind](number)

    def _unpack(self, code):
        span = self._skip(struct.calcsize(code))
        data = self.file.bytes(span.start, span.end - span.start)
        return struct.unpack(f">{code}", data)[0]

    def _skip(self, length):
        start, self.position = self.position, self.position + length
        if self.position > self.end:
            raise ValueError(
                f"{length:,} bytes are expected at byte {start:,}, but only "
                f"{self.end - start:,} are left"
            )
        return _ByteRange(start, self.position)

    def _string(self, length):
        span = self._skip(length)
        return self.file.bytes(span.start, length).decode("utf-8")

    def _list(self, count):
        self._check_count(count)
        return [self.value() for _ in range(count)]

    def _map(self, count):
        self._check_count(count)
        result = {}
        for _ in range(count):
            key = self.value()
            if not isinstance(key, (str, int)) or key in result:
                raise ValueError(f"a map has the invalid or duplicate key {key!r}")
            result[key] = self.value()
        return result

    def _check_count(self, count):
        if count > self.end - self.position:  # Each takes at least one byte.
            raise ValueError(
                f"{count:,} values are expected at byte {self.position:,}, but only "
                f"{self.end - self.position:,} bytes are left"
            )

    def _extension(self, length):
        kind = self._unpack("b")
        span = self._skip(length)
        if kind != ARRAY:
            return span
        inner = self.within(span)
        parts = inner.value()
        if not isinstance(parts, list) or len(parts) != 3 or inner.position != span.end:
            raise ValueError(
                f"the array at byte {span.start:,} was not written by Flax"
            )
        shape, dtype, data = parts
        if not isinstance(shape, list) or not is_shape(shape):
            raise ValueError(f"the array at byte {span.start:,} has an invalid shape")
        known = isinstance(dtype, str) and dtype in _ITEMSIZES
        if not known or not isinstance(data, _ByteRange):
            raise ValueError(f"the array at byte {span.start:,} has dtype {dtype!r}")
        if data.end - data.start != math.prod(shape) * _ITEMSIZES[dtype]:
            raise ValueError(
                f"the array at byte {span.start:,}, {dtype} of shape {shape}, has "
                f"{data.end - data.start:,} bytes"
            )
        return _Array(data.start, tuple(shape), dtype)
