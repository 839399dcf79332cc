"""Python files for HDF5: one that can be closed on a full disk, and one in memory.

HDF5 can neither finish nor close a file that it cannot write: the process then crashes
when Python exits. So it writes to a Python file which reports success, and keeps in
memory what the disk did not take. The error is raised when HDF5 has closed the file.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator

import h5py

from keras_openllama.backend.keras_private import open_hdf5_files_with
from keras_openllama.utils.types import PathLike

# Heuristic: HDF5 reads back its metadata, which are small, but no weights.
_LARGEST_METADATA = 1 << 20


@contextlib.contextmanager
def closable_hdf5_files() -> Iterator[None]:
    """Lets Keras save weights in files that can be closed on a full disk.

    Raises:
        OSError: at the end of the block, if a file could not be written.

    Example:
        >>> import keras
        >>> with closable_hdf5_files():
        ...     keras.Model.save_weights(lm, "nano.weights.h5")
    """
    files = []

    def open_file(path, mode):
        files.append(_ClosableFile(path, mode))
        return h5py.File(files[-1], mode)

    try:
        with open_hdf5_files_with(open_file):
            yield
    finally:
        for file in files:
            file.close_on_disk()
    for file in files:
        if file.error is not None:
            raise file.error


class _RandomAccessFile(io.RawIOBase):
    """A file with a position and a size, as HDF5 needs it."""

    def __init__(self, size: int = 0):
        self.size = size
        self._position = 0

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Moves the position, as `io.RawIOBase.seek`."""
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.size}
        self._position = start[whence] + offset
        return self._position

    def tell(self) -> int:
        """Returns the position."""
        return self._position

    def truncate(self, size: int | None = None) -> int:
        """Sets the size of the file."""
        self.size = self._position if size is None else size
        return self.size

    def _advance(self, count):
        """Moves the position past what was written."""
        self._position += count
        self.size = max(self.size, self._position)

    def _read_from(self, writes, view):
        """Copies what was written at the position to a buffer, and moves past it."""
        begin, count = self._position, len(view)
        for start, data in writes:
            first, last = max(start, begin), min(start + len(data), begin + count)
            if first < last:
                view[first - begin : last - begin] = data[first - start : last - start]
        self._position += count
        return count


class RecordingFile(_RandomAccessFile):
    """A sparse in-memory file that records each write.

    Attributes:
        writes: Offset and bytes of each write.
        size: Size of the file.

    Example:
        >>> file = RecordingFile()
        >>> _ = file.write(b"abc")
        >>> file.writes
        [(0, b'abc')]
    """

    def __init__(self):
        super().__init__()
        self.writes = []

    def write(self, data: bytes) -> int:
        """Records a write at the position."""
        self.writes.append((self._position, bytes(data)))
        self._advance(len(data))
        return len(data)

    def readinto(self, buffer: bytearray) -> int:
        """Reads back what was written, as HDF5 does. Gaps are zeros."""
        view = memoryview(buffer)
        view[:] = bytes(len(view))
        return self._read_from(self.writes, view)


class _ClosableFile(_RandomAccessFile):
    """A file whose errors are stored instead of raised.

    Args:
        path: Path of the file.
        mode: `"w"`, or `"a"` to change an existing file.

    Attributes:
        error: The first `OSError`, or `None`.
    """

    def __init__(self, path: PathLike, mode: str):
        self._path = str(path)
        self._file = open(path, "w+b" if mode == "w" else "r+b", buffering=0)
        super().__init__(size=self._file.seek(0, io.SEEK_END))
        self._unwritten = []  # Offset and bytes of metadata that the disk did not take.
        self.error = None

    def __repr__(self):
        return self._path  # h5py derives the name of the file from it.

    def write(self, data: bytes) -> int:
        """Writes all data at the position; never fails."""
        data = memoryview(data).cast("B")
        with self._storing_errors():
            self._file.seek(self._position)
            rest = data
            while rest:  # A nearly full disk writes only a part at first.
                rest = rest[self._file.write(rest) :]
        if self.error is not None and len(data) <= _LARGEST_METADATA:
            self._unwritten.append((self._position, bytes(data)))
        self._advance(len(data))
        return len(data)

    def readinto(self, buffer: bytearray) -> int:
        """Reads what was written; zeros in gaps."""
        view = memoryview(buffer).cast("B")
        self._file.seek(self._position)
        found = self._file.readinto(view) or 0
        view[found:] = bytes(len(view) - found)
        return self._read_from(self._unwritten, view)

    def truncate(self, size: int | None = None) -> int:
        """Sets the size of the file; never fails."""
        size = super().truncate(size)
        with self._storing_errors():
            self._file.truncate(size)
        return size

    def close_on_disk(self) -> None:
        """Closes the file on the disk; HDF5 may still write, to no effect."""
        with self._storing_errors():
            self._file.close()

    @contextlib.contextmanager
    def _storing_errors(self):
        try:
            yield
        except (OSError, ValueError) as error:  # ValueError: the file is closed.
            self.error = self.error or error
