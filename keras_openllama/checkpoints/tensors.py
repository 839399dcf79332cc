"""Tensors that lie in a file: described first, mapped on demand, never copied here."""

import collections
import concurrent.futures
import dataclasses
import math
import mmap
import os
from typing import Protocol

import ml_dtypes
import numpy as np

_PAGE = mmap.PAGESIZE
_READ_AHEAD_BYTES = 8 << 20
_TENSORS_AHEAD = 4
_MOST_AXES = 32  # Heuristic: no weight has more than three.


class ReadableTensor(Protocol):
    """A tensor that can be read one at a time: what every writer of weights takes.

    Attributes:
        name: string, what it is called where it is.
        dtype: string, name of its dtype.
        nbytes: int, bytes that reading it takes.
    """

    name: str
    dtype: str
    nbytes: int

    def array(self) -> np.ndarray:
        """The tensor as a NumPy array. Not to be written to: it may lie on a file."""

    def touch(self) -> None:
        """Reads it into memory, where that can be done ahead; called from a thread."""

    def drop(self) -> None:
        """Gives back the memory that `touch` and `array` took."""


class StoredTensor(ReadableTensor, Protocol):
    """A tensor in a file: what every reader of weights returns.

    Attributes:
        shape: tuple of ints.
        offset: int, its place in the file, for sorting.
        file: the file or checkpoint that holds it, which has a `path`.
    """

    shape: tuple
    offset: int
    file: object


class MappedFile:
    """A file mapped read-only, whose pages can be asked for and given back.

    Args:
        path: path of the file.

    Raises:
        OSError: if the file cannot be opened.
        ValueError: if the file is empty.
    """

    def __init__(self, path):
        self.path = os.fspath(path)
        with open(self.path, "rb") as file:
            self.size = os.fstat(file.fileno()).st_size
            if self.size == 0:
                raise ValueError(f"{self.path} is empty. {self.remedy}")
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    @property
    def remedy(self):
        """What a user can do about a damaged file."""
        # In the cache of huggingface_hub, the name is a link: deleting that alone
        # would bring the damaged file back.
        real = os.path.realpath(self.path)
        return f"If it is truncated or damaged, delete {real} and get it again."

    def bytes(self, start, length):
        """The bytes `[start, start + length)`, copied; fewer at the file's end."""
        return self._map[start : start + length]

    def array(self, start, count, dtype):
        """`count` elements from byte `start`, as a 1-D read-only array on the map."""
        return np.frombuffer(self._map, dtype, count, start)

    def touch(self, start, length):
        """Reads a range into memory; to be called from a thread that runs ahead."""
        for begin in range(start, start + length, _READ_AHEAD_BYTES):
            count = min(_READ_AHEAD_BYTES, start + length - begin)
            self._advise("MADV_WILLNEED", begin, count)
            # One byte of each page is enough; NumPy lets other threads run meanwhile.
            self.array(begin, count, np.uint8)[::_PAGE].max()

    def drop(self, start, length):
        """Gives a range's pages back; reading the range again fetches it again."""
        self._advise("MADV_DONTNEED", start, length)

    def _advise(self, advice, start, length):
        if length and hasattr(mmap, advice):  # Not every system takes advice.
            first_page = start - start % _PAGE
            length += start - first_page
            self._map.madvise(getattr(mmap, advice), first_page, length)


@dataclasses.dataclass(frozen=True)
class MappedTensor:
    """A `StoredTensor` in one piece; nothing is read before `array()` is used.

    Attributes:
        name: the tensor's name in the file.
        dtype: name of its dtype, such as `"float16"`.
        shape: tuple of ints.
        strides: tuple of ints, in elements.
        offset: where its first element lies, in bytes from the file's start.
        file: the `MappedFile` that holds it.
    """

    name: str
    dtype: str
    shape: tuple
    strides: tuple
    offset: int
    file: MappedFile

    @property
    def itemsize(self):
        return numpy_dtype(self.dtype).itemsize

    @property
    def nbytes(self):
        """Bytes of the file that the tensor spans."""
        return extent(self.shape, self.strides) * self.itemsize

    def array(self):
        """The tensor as a read-only NumPy array on the mapped file, without a copy."""
        dtype = numpy_dtype(self.dtype)
        count = extent(self.shape, self.strides)
        flat = self.file.array(self.offset, count, dtype)
        if self.strides == contiguous_strides(self.shape):
            return flat.reshape(self.shape)
        strides = tuple(stride * dtype.itemsize for stride in self.strides)
        return np.lib.stride_tricks.as_strided(
            flat, self.shape, strides, writeable=False
        )

    def transposed(self):
        """The same tensor with its axes in the opposite order."""
        return dataclasses.replace(
            self, shape=self.shape[::-1], strides=self.strides[::-1]
        )

    def touch(self):
        self.file.touch(self.offset, self.nbytes)

    def drop(self):
        self.file.drop(self.offset, self.nbytes)


class RearrangedTensor:
    """A stored tensor whose elements are put in another order when it is read.

    Args:
        stored: `MappedTensor` or `JoinedTensor`.
        shape: tuple of ints, the shape that results.
        rearrange: function from its array to one of that shape.
    """

    def __init__(self, stored, shape, rearrange):
        self.name = stored.name
        self.dtype = stored.dtype
        self.shape = shape
        self.offset = stored.offset
        self.file = stored.file
        self.nbytes = stored.nbytes
        self.touch = stored.touch
        self.drop = stored.drop
        self._array = stored.array
        self._rearrange = rearrange

    def array(self):
        """The tensor in its new order, a copy."""
        return self._rearrange(self._array())


class JoinedTensor:
    """A tensor that lies in several pieces in a file.

    Args:
        name: string, its name.
        shape: tuple of ints.
        parts: list of 1-D `MappedTensor`s, its elements in order.
    """

    def __init__(self, name, shape, parts):
        self.name = name
        self.shape = shape
        self.dtype = parts[0].dtype
        self.offset = parts[0].offset
        self.file = parts[0].file
        self.nbytes = sum(part.nbytes for part in parts)
        self._parts = parts

    def transposed(self):
        return RearrangedTensor(self, self.shape[::-1], np.transpose)

    def array(self):
        """The tensor in one piece, a copy."""
        parts = [part.array() for part in self._parts]
        return np.concatenate(parts).reshape(self.shape)

    def touch(self):
        for part in self._parts:
            part.touch()

    def drop(self):
        for part in self._parts:
            part.drop()


def in_file_order(tensors):
    """Tensors in the order in which they lie in their files, which disks like best."""
    return sorted(tensors, key=lambda tensor: (tensor.file.path, tensor.offset))


class ReadAhead:
    """Reads tensors from the disk in a thread, a little ahead of their use.

    Use as a context manager, and iterate over it once: it yields the tensors in the
    order given, as their bytes have come into memory.

    Args:
        tensors: list of `ReadableTensor`s.

    Example:

    ```python
    with ReadAhead(torch_zip.read(path).values()) as ahead:
        for stored in ahead:
            use(stored.array())
            stored.drop()
    ```
    """

    def __init__(self, tensors):
        self._waiting = iter(list(tensors))
        self._reading = collections.deque()

    def __enter__(self):
        self._pool = concurrent.futures.ThreadPoolExecutor(1)
        for _ in range(_TENSORS_AHEAD):
            self._read_next()
        return self

    def __exit__(self, *_):
        self._pool.shutdown(cancel_futures=True)

    def __iter__(self):
        while self._reading:
            tensor, read = self._reading.popleft()
            read.result()
            yield tensor
            self._read_next()

    def _read_next(self):
        for tensor in self._waiting:
            self._reading.append((tensor, self._pool.submit(tensor.touch)))
            return


def numpy_dtype(name):
    """NumPy's dtype of that name, bfloat16 included."""
    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)


def dense_bytes(shape, dtype):
    """Bytes of a tensor without gaps."""
    return math.prod(shape) * numpy_dtype(dtype).itemsize


def is_shape(value):
    """Whether a value from a file can be a tensor's shape."""
    return (
        isinstance(value, (list, tuple))
        and len(value) <= _MOST_AXES
        and all(map(is_size, value))
    )


def is_size(value):
    """Whether a value from a file can be a size or an offset."""
    return type(value) is int and 0 <= value < 1 << 62


def contiguous_strides(shape):
    """Strides, in elements, of a tensor whose last axis varies fastest."""
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def extent(shape, strides):
    """Number of elements from a tensor's first to its last, both included."""
    if 0 in shape:
        return 0
    return 1 + sum(
        (size - 1) * stride for size, stride in zip(shape, strides, strict=True)
    )
