"""EasyLM's and Flax's msgpack files, read where they lie.

EasyLM streams: the file is a row of records `[key, bytes]`, where the key is a list of
strings and the bytes are Flax's msgpack of one array. Flax itself writes one nested
map of arrays. An array is an extension of type 1 that holds `[shape, dtype, bytes]`;
Flax cuts those of more than 1 GB into chunks.

Read here rather than with the `msgpack` library, which copies each array several times
and cannot say where in the file it lies.

Sources: https://github.com/msgpack/msgpack/blob/master/spec.md,
https://github.com/young-geng/EasyLM/blob/main/EasyLM/checkpoint.py,
https://github.com/google/flax/blob/main/flax/serialization.py
"""

import dataclasses
import itertools
import math
import struct

from keras_openllama.checkpoints.tensors import (
    JoinedTensor,
    MappedFile,
    MappedTensor,
    contiguous_strides,
    is_shape,
)

ARRAY = 1  # Flax's type of extension for an array.
_CHUNKED = "__msgpack_chunked_array__"
# How files begin that people take for one of EasyLM.
_OTHERS = {
    "a safetensors file": lambda file: file.bytes(8, 1) == b"{",
    "a PyTorch file": lambda file: file.bytes(0, 2) == b"PK",
    "a JSON file": lambda file: file.bytes(0, 1) == b"{",
    "an HDF5 file of Keras": lambda file: file.bytes(1, 3) == b"HDF",
}
# The dtypes that Flax may name, and the bytes of an element.
_ITEMSIZES = {
    "bool": 1,
    **{f"{sign}int{8 * size}": size for sign in ("", "u") for size in (1, 2, 4, 8)},
    **{"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8},
    **{"complex64": 8, "complex128": 16},
}
# Ours: values in a file at most. A train state of 13B has some ten thousand.
_MOST_VALUES = 1 << 20


def read(path):
    """Describes the arrays of a file of EasyLM or Flax; none is read yet.

    Args:
        path: path of the file.

    Returns:
        Dict of `tensors.StoredTensor`s by key, a tuple of strings.

    Raises:
        OSError: if the file cannot be opened.
        ValueError: if the file is truncated, damaged or something else. The message
            names the file.

    Example:

    ```python
    tensors = msgpack.read("streaming_params")
    tensors["transformer", "wte", "embedding"].array()
    ```
    """
    file = MappedFile(path)
    try:
        return _read(file)
    except (ValueError, RecursionError) as error:
        other = next((o for o, holds in _OTHERS.items() if holds(file)), None)
        remedy = file.remedy
        if other:
            remedy = f"It looks like {other}: give the directory that it is in."
        raise ValueError(
            f"{file.path} ({file.size:,} bytes) cannot be read as a msgpack file of "
            f"EasyLM: {error}. {remedy}"
        ) from error


def _read(file):
    reader = _Reader(file, 0, file.size)
    if _is_map(file.bytes(0, 1)[0]):
        leaves = _leaves(reader.value())
        if reader.position != file.size:
            raise ValueError(f"something follows its map at byte {reader.position:,}")
    else:
        leaves = _records(reader)
    tensors = {}
    for key, leaf in leaves:
        if isinstance(leaf, (_Array, _Chunked)):
            if key in tensors:
                raise ValueError(f"{'/'.join(key)} is in it twice")
            tensors[key] = leaf.stored("/".join(key), file)
    return tensors


def _is_map(first):
    return first >> 4 == 0x8 or first in (0xDE, 0xDF)


def _records(reader):
    """Key and value of each record of a stream."""
    while reader.position < reader.end:
        start = reader.position
        record = reader.value()
        if not isinstance(record, list) or len(record) != 2:
            raise ValueError(f"byte {start:,} begins no pair of a key and bytes")
        key, value = record
        if not isinstance(key, list) or not all(map(_is_name, key)):
            raise ValueError(f"byte {start:,} begins a pair without a key of strings")
        if not isinstance(value, _Bytes):
            raise ValueError(f"{'/'.join(key)} is no bytes")
        inner = reader.within(value)
        leaf = _joined(inner.value())
        if inner.position != inner.end:
            raise ValueError(f"something follows the value of {'/'.join(key)}")
        yield tuple(key), leaf


def _leaves(node, key=()):
    """Key and value of each leaf of a nested map."""
    node = _joined(node)
    if not isinstance(node, dict):
        yield key, node
        return
    for name, child in node.items():
        if not _is_name(name):
            raise ValueError(f"a key of its map is {name!r}")
        yield from _leaves(child, (*key, name))


def _is_name(key):
    return isinstance(key, str) and "/" not in key


@dataclasses.dataclass(frozen=True)
class _Bytes:
    """A range of the file."""

    start: int
    end: int


@dataclasses.dataclass(frozen=True)
class _Array:
    """An array: where its elements lie, and what they are."""

    start: int
    shape: tuple
    dtype: str

    def stored(self, name, file):
        strides = contiguous_strides(self.shape)
        return MappedTensor(name, self.dtype, self.shape, strides, self.start, file)


@dataclasses.dataclass(frozen=True)
class _Chunked:
    """An array in several pieces."""

    shape: tuple
    chunks: list

    def stored(self, name, file):
        parts = [chunk.stored(name, file) for chunk in self.chunks]
        found = sum(math.prod(part.shape) for part in parts)
        if found != math.prod(self.shape) or len({part.dtype for part in parts}) != 1:
            raise ValueError(
                f"{name} has {found:,} elements in its chunks for shape {self.shape}"
            )
        return JoinedTensor(name, self.shape, parts)


def _joined(node):
    """Flax's map for an array in chunks as one leaf; anything else as it is."""
    if not isinstance(node, dict) or _CHUNKED not in node:
        return node
    shape, chunks = (_row(node.get(part)) for part in ("shape", "chunks"))
    if not is_shape(shape) or not chunks:
        raise ValueError("an array in chunks has an impossible shape")
    if not all(isinstance(c, _Array) and len(c.shape) == 1 for c in chunks):
        raise ValueError("an array in chunks has a chunk that is no row of numbers")
    return _Chunked(tuple(shape), chunks)


def _row(node):
    """A list that Flax wrote as a map from "0", "1" and so on."""
    if not isinstance(node, dict) or set(node) != set(map(str, range(len(node)))):
        raise ValueError("an array in chunks lacks its shape or chunks")
    return [node[str(i)] for i in range(len(node))]


# By first byte: what follows, and the struct format of its length or value.
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
    """Parses msgpack between two positions of a file, without copying its bytes."""

    def __init__(self, file, position, end, budget=None):
        self.file = file
        self.position = position
        self.end = end
        # Values that may still be read; readers within others share it.
        self._budget = itertools.count() if budget is None else budget

    def within(self, span):
        """A reader for the msgpack that some bytes hold."""
        return _Reader(self.file, span.start, span.end, self._budget)

    def value(self):
        """The next value: `None`, bool, number, string, list, dict, `_Bytes`, `_Array`.

        Extensions of other types are `_Bytes`.
        """
        if next(self._budget) > _MOST_VALUES:
            raise ValueError(f"it holds more than {_MOST_VALUES:,} values")
        first = self._unpack("B")
        if first < 0x80:
            return first
        if first >= 0xE0:
            return first - 0x100
        if first in _CONSTANTS:
            return _CONSTANTS[first]
        if first < 0xC0:  # Short ones, with their length in the same byte.
            if first >= 0xA0:
                return self._string(first & 0x1F)
            kind = self._list if first >= 0x90 else self._map
            return kind(first & 0x0F)
        if 0xD4 <= first <= 0xD8:
            return self._extension(1 << (first - 0xD4))
        if first not in FORMATS:
            raise ValueError(f"byte {self.position - 1:,} is no msgpack")
        kind, code = FORMATS[first]
        number = self._unpack(code)
        if kind == "number":
            return number
        read = {
            "bin": self._skip,
            "ext": self._extension,
            "str": self._string,
            "list": self._list,
            "map": self._map,
        }
        return read[kind](number)

    def _unpack(self, code):
        span = self._skip(struct.calcsize(code))
        data = self.file.bytes(span.start, span.end - span.start)
        return struct.unpack(f">{code}", data)[0]

    def _skip(self, length):
        start, self.position = self.position, self.position + length
        if self.position > self.end:
            raise ValueError(
                f"{length:,} bytes are due at byte {start:,}, and there are "
                f"{self.end - start:,}"
            )
        return _Bytes(start, self.position)

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
                raise ValueError(f"a map has the key {key!r}, or has it twice")
            result[key] = self.value()
        return result

    def _check_count(self, count):
        if count > self.end - self.position:  # Each takes at least one byte.
            raise ValueError(f"{count:,} values are due at byte {self.position:,}")

    def _extension(self, length):
        kind = self._unpack("b")
        span = self._skip(length)
        if kind != ARRAY:
            return span
        inner = self.within(span)
        parts = inner.value()
        if not isinstance(parts, list) or len(parts) != 3 or inner.position != span.end:
            raise ValueError(f"the array at byte {span.start:,} is none of Flax's")
        shape, dtype, data = parts
        if not isinstance(shape, list) or not is_shape(shape):
            raise ValueError(f"the array at byte {span.start:,} has no possible shape")
        known = isinstance(dtype, str) and dtype in _ITEMSIZES
        if not known or not isinstance(data, _Bytes):
            raise ValueError(f"the array at byte {span.start:,} has dtype {dtype!r}")
        if data.end - data.start != math.prod(shape) * _ITEMSIZES[dtype]:
            raise ValueError(
                f"the array at byte {span.start:,}, {dtype} of shape {shape}, has "
                f"{data.end - data.start:,} bytes"
            )
        return _Array(data.start, tuple(shape), dtype)
