"""Memory-mapped tensors of checkpoint files, and reading them ahead of their use."""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import math
import mmap
import os
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, Protocol

import ml_dtypes
import numpy as np
from numpy.typing import DTypeLike, NDArray

from keras_openllama.utils.locks import IS_POSIX
from keras_openllama.utils.mapping import map_privately
from keras_openllama.utils.text_files import check_not_lfs_pointer
from keras_openllama.utils.types import PathLike

if TYPE_CHECKING:
    from keras_openllama.quantization.policies import MatrixFormat
    from keras_openllama.quantization.quantized_matrix import QuantizedMatrix

_PAGE = mmap.PAGESIZE
_READ_AHEAD_BYTES = 8 << 20
_TENSORS_AHEAD = 4
_MAX_AXES = 32  # Heuristic: no weight has more than three.


class ReadableTensor(Protocol):
    """A tensor that is read on demand: what the writer of every format takes.

    Attributes:
        name: Its name in the checkpoint or the model that it comes from.
        dtype: Name of its dtype, such as `"bfloat16"`.
        nbytes: Number of bytes that are read for it.
    """

    name: str
    dtype: str
    nbytes: int

    def array(self) -> np.ndarray:
        """Returns the tensor as an array. Do not write to it: it may map a file."""

    def prefetch(self) -> None:
        """Reads the tensor into memory if that is possible; called from a thread."""

    def release(self) -> None:
        """Releases the memory that `prefetch` and `array` use."""


class StoredTensor(ReadableTensor, Protocol):
    """A tensor in a checkpoint: what the reader of every format returns.

    Attributes:
        shape: Its shape.
        offset: Its position in the file, by which tensors are sorted.
        file: The file or checkpoint that holds it, which has a `path`.
    """

    shape: tuple[int, ...]
    offset: int
    file: Any


class QuantizedTensor(StoredTensor, Protocol):
    """A matrix that is quantized in its file, and may stay as it is.

    Attributes:
        format: How it is quantized; `None` if a layer cannot have it so.
    """

    format: MatrixFormat | None

    def quantized_matrix(self) -> QuantizedMatrix:
        """Returns the matrix in this format. `array` returns its weights."""


class MappedFile:
    """A file that is mapped into memory. It is never written to.

    Args:
        path: Path of the file.

    Attributes:
        can_be_shared: Whether `shared_array` is possible: not on Windows, where mapped
            files cannot be replaced, nor where Linux reserves memory for it and has not
            enough.

    Raises:
        OSError: If the file cannot be opened.
        ValueError: If the file is empty, or a Git LFS pointer.
    """

    def __init__(self, path: PathLike):
        self.path = os.fspath(path)
        with open(self.path, "rb") as file:
            self.size = os.fstat(file.fileno()).st_size
            if self.size == 0:
                raise ValueError(f"{self.path} is empty. {self.remedy}")
            check_not_lfs_pointer(file.read(64), self.path)
            try:
                self.can_be_shared = IS_POSIX
                self._map = map_privately(file)
            except OSError:
                self.can_be_shared = False
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    @property
    def remedy(self) -> str:
        """A sentence for error messages: what to do about a damaged file."""
        # In the cache of huggingface_hub, the path is a symbolic link. If only the
        # link were deleted, the damaged file would be used again.
        real = os.path.realpath(self.path)
        return f"If it is truncated or damaged, delete {real} and download it again."

    def bytes(self, start: int, length: int) -> bytes:
        """Returns a copy of the bytes `[start, start + length)`.

        Args:
            start: Offset of the first byte.
            length: Number of bytes.

        Returns:
            The bytes; fewer than `length` at the end of the file.
        """
        return self._map[start : start + length]

    def array(self, start: int, count: int, dtype: DTypeLike) -> NDArray:
        """Returns a range of the file as an array that shares the mapped memory.

        Args:
            start: Offset of the first element, in bytes.
            count: Number of elements.
            dtype: Their dtype.

        Returns:
            Read-only array of shape `(count,)`.
        """
        array = np.frombuffer(self._map, dtype, count, start)
        array.flags.writeable = False
        return array

    def shared_array(self, start: int, count: int, dtype: DTypeLike) -> NDArray:
        """Returns a range of the file as an array that may be written to.

        What is written is in memory only. `release` would discard it.

        Args:
            start: As for `array`.
            count: As for `array`.
            dtype: As for `array`.

        Returns:
            Writable array of shape `(count,)`.
        """
        return np.frombuffer(self._map, dtype, count, start)

    def prefetch(self, start: int, length: int) -> None:
        """Reads the bytes `[start, start + length)` into memory; blocks until done."""
        for begin in range(start, start + length, _READ_AHEAD_BYTES):
            count = min(_READ_AHEAD_BYTES, start + length - begin)
            self._advise("MADV_WILLNEED", begin, count)
            # Reading one byte of each page is enough. NumPy releases the GIL.
            self.array(begin, count, np.uint8)[::_PAGE].max()

    def release(self, start: int, length: int) -> None:
        """Releases the memory of a range. The range can still be read again."""
        self._advise("MADV_DONTNEED", start, length)

    def _advise(self, advice, start, length):
        if length and hasattr(mmap, advice):  # Not every system supports it.
            first_page = start - start % _PAGE
            length += start - first_page
            self._map.madvise(getattr(mmap, advice), first_page, length)


@dataclasses.dataclass(frozen=True)
class MappedTensor:
    """A `StoredTensor` that is one range of a file. Reading is lazy.

    Attributes:
        name: Its name in the file.
        dtype: Name of its dtype, such as `"float16"`.
        shape: Its shape.
        strides: Its strides, in elements.
        offset: Offset of its first element, in bytes from the start of the file.
        file: The file that holds it.

    Example:
        >>> with open("numbers", "wb") as file:
        ...     _ = file.write(np.arange(6, dtype="float32").tobytes())
        >>> file = MappedFile("numbers")
        >>> tensor = MappedTensor("x", "float32", (2, 3), (3, 1), 0, file)
        >>> tensor.transposed().array().tolist()
        [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int
    file: MappedFile

    @property
    def itemsize(self) -> int:
        """Number of bytes of an element."""
        return numpy_dtype(self.dtype).itemsize

    @property
    def nbytes(self) -> int:
        """Number of bytes of the file that the tensor spans."""
        return extent(self.shape, self.strides) * self.itemsize

    def array(self) -> NDArray:
        """Returns a read-only array that shares the memory of the mapped file."""
        dtype = numpy_dtype(self.dtype)
        count = extent(self.shape, self.strides)
        flat = self.file.array(self.offset, count, dtype)
        if self.is_contiguous:
            return flat.reshape(self.shape)
        strides = tuple(stride * dtype.itemsize for stride in self.strides)
        return np.lib.stride_tricks.as_strided(
            flat, self.shape, strides, writeable=False
        )

    @property
    def is_contiguous(self) -> bool:
        """Whether the elements are in C order, without gaps."""
        return self.strides == contiguous_strides(self.shape)

    def shared_array(self) -> NDArray:
        """Returns a writable array, see `MappedFile.shared_array`.

        The tensor must be contiguous.
        """
        dtype, count = numpy_dtype(self.dtype), math.prod(self.shape)
        return self.file.shared_array(self.offset, count, dtype).reshape(self.shape)

    def transposed(self) -> MappedTensor:
        """Returns the same tensor with its axes reversed."""
        return dataclasses.replace(
            self, shape=self.shape[::-1], strides=self.strides[::-1]
        )

    def prefetch(self) -> None:
        """Reads the tensor into memory."""
        self.file.prefetch(self.offset, self.nbytes)

    def release(self) -> None:
        """Releases the memory of the tensor."""
        self.file.release(self.offset, self.nbytes)


class RearrangedTensor:
    """A `StoredTensor` whose elements are reordered when it is read.

    Args:
        stored: The tensor as the file stores it.
        shape: The shape of the result.
        rearrange: Function that takes the stored array and returns the result.
    """

    def __init__(
        self,
        stored: MappedTensor | JoinedTensor,
        shape: tuple[int, ...],
        rearrange: Callable[[NDArray], NDArray],
    ):
        self.name = stored.name
        self.dtype = stored.dtype
        self.shape = shape
        self.offset = stored.offset
        self.file = stored.file
        self.nbytes = stored.nbytes
        self.prefetch = stored.prefetch
        self.release = stored.release
        self._array = stored.array
        self._rearrange = rearrange

    def array(self) -> NDArray:
        """Returns a copy of the tensor in the new order."""
        return self._rearrange(self._array())


class JoinedTensor:
    """A `StoredTensor` that a file stores in several chunks.

    Args:
        name: Its name.
        shape: Its shape.
        parts: Its elements in order, as tensors of one axis.
    """

    def __init__(self, name: str, shape: tuple[int, ...], parts: list[MappedTensor]):
        self.name = name
        self.shape = shape
        self.dtype = parts[0].dtype
        self.offset = parts[0].offset
        self.file = parts[0].file
        self.nbytes = sum(part.nbytes for part in parts)
        self._parts = parts

    def transposed(self) -> RearrangedTensor:
        """Returns the same tensor with its axes reversed."""
        return RearrangedTensor(self, self.shape[::-1], np.transpose)

    def array(self) -> NDArray:
        """Returns a copy of the tensor in one array."""
        parts = [part.array() for part in self._parts]
        return np.concatenate(parts).reshape(self.shape)

    def prefetch(self) -> None:
        """Reads the tensor into memory."""
        for part in self._parts:
            part.prefetch()

    def release(self) -> None:
        """Releases the memory of the tensor."""
        for part in self._parts:
            part.release()


def in_file_order(tensors: Iterable[StoredTensor]) -> list[StoredTensor]:
    """Sorts tensors by file and offset, so that the disk is read sequentially."""
    return sorted(tensors, key=lambda tensor: (tensor.file.path, tensor.offset))


class ReadAhead:
    """Reads tensors from the disk in a thread, a few tensors ahead of their use.

    Use it as a context manager, and iterate over it once. It yields the tensors in the
    given order, each after its bytes were read into memory.

    Args:
        tensors: The tensors, in the order in which they are used.

    Example:
        >>> with open("numbers", "wb") as file:
        ...     _ = file.write(np.arange(6, dtype="float32").tobytes())
        >>> file = MappedFile("numbers")
        >>> first = MappedTensor("first", "float32", (3,), (1,), 0, file)
        >>> second = MappedTensor("second", "float32", (3,), (1,), 12, file)
        >>> with ReadAhead([first, second]) as ahead:
        ...     for tensor in ahead:
        ...         print(tensor.array())
        ...         tensor.release()
        [0. 1. 2.]
        [3. 4. 5.]
    """

    def __init__(self, tensors: Iterable[ReadableTensor]):
        self._waiting = iter(list(tensors))
        self._reading = collections.deque()

    def __enter__(self):
        self._pool = concurrent.futures.ThreadPoolExecutor(1)
        for _ in range(_TENSORS_AHEAD):
            self._read_next()
        return self

    def __exit__(self, *_):
        self._pool.shutdown(cancel_futures=True)

    def __iter__(self) -> Iterator[ReadableTensor]:
        while self._reading:
            tensor, read = self._reading.popleft()
            read.result()
            yield tensor
            self._read_next()

    def _read_next(self):
        tensor = next(self._waiting, None)
        if tensor is not None:
            self._reading.append((tensor, self._pool.submit(tensor.prefetch)))


def numpy_dtype(name: str) -> np.dtype:
    """Returns the NumPy dtype of a name, which may be `"bfloat16"`.

    Example:
        >>> numpy_dtype("bfloat16").itemsize
        2
    """
    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)


def dense_bytes(shape: Iterable[int], dtype: str) -> int:
    """Returns the size of a contiguous tensor in bytes.

    Example:
        >>> dense_bytes((3, 5), "bfloat16")
        30
    """
    return math.prod(shape) * numpy_dtype(dtype).itemsize


def is_shape(value: Any) -> bool:
    """Returns whether a value that was read from a file is a valid shape.

    Example:
        >>> is_shape([3, 5]), is_shape([3, -5]), is_shape("35")
        (True, False, False)
    """
    return (
        isinstance(value, (list, tuple))
        and len(value) <= _MAX_AXES
        and all(map(is_size, value))
    )


def is_size(value: Any) -> bool:
    """Returns whether a value that was read from a file is a valid size or offset."""
    return type(value) is int and 0 <= value < 1 << 62


def contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the strides, in elements, of a C-contiguous tensor.

    Example:
        >>> contiguous_strides((2, 3, 4))
        (12, 4, 1)
    """
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def extent(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """Returns the number of elements that a strided tensor spans in memory.

    Args:
        shape: Its shape.
        strides: Its strides, in elements; not negative.

    Returns:
        The distance from the first to the last element, both included.

    Example:
        >>> extent((2, 3), (10, 1))
        13
    """
    if 0 in shape:
        return 0
    return 1 + sum(
        (size - 1) * stride for size, stride in zip(shape, strides, strict=True)
    )
