"""Files that are written by a thread, while the caller prepares the next part."""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import os
from collections.abc import Iterator
from typing import Any, BinaryIO

from keras_openllama.utils.types import PathLike

_MAX_PENDING = 4  # Heuristic: parts have some MB each.


@contextlib.contextmanager
def open_in_background(path: PathLike) -> Iterator[BackgroundWriter]:
    """Opens a file for writing in a thread; the file is on the disk after the block.

    Args:
        path: Path of the file.

    Yields:
        An object with `write`, `seek` and `truncate`. Data that is written must not
        change afterwards. Errors of the thread are raised by a later call, or at the
        end of the block.

    Raises:
        OSError: If the file cannot be opened or written.

    Example:
        >>> with open_in_background("numbers") as file:
        ...     file.write(bytes(1000))
        >>> os.path.getsize("numbers")
        1000
    """
    with open(path, "wb") as file:
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            writer = BackgroundWriter(file, pool)
            yield writer
            writer.wait(max_pending=0)
        # Inside the block, where a progress bar is still visible.
        file.flush()
        os.fsync(file.fileno())


class BackgroundWriter:
    """Passes calls to a thread, with a limit on pending calls."""

    def __init__(
        self, file: BinaryIO, pool: concurrent.futures.ThreadPoolExecutor
    ) -> None:
        self._file = file
        self._pool = pool
        self._pending = collections.deque()

    def write(self, data: Any) -> None:
        """Writes an object with the buffer protocol."""
        self._call(self._file.write, data)

    def seek(self, position: int) -> None:
        """Sets the position of the next write, in bytes from the start."""
        self._call(self._file.seek, position)

    def truncate(self, size: int) -> None:
        """Resizes the file to `size` bytes."""
        self._call(self._file.truncate, size)

    def wait(self, max_pending: int) -> None:
        """Waits until at most `max_pending` calls are pending; raises their errors."""
        while self._pending and (
            len(self._pending) > max_pending or self._pending[0].done()
        ):
            self._pending.popleft().result()

    def _call(self, method, argument):
        self.wait(max_pending=_MAX_PENDING)
        self._pending.append(self._pool.submit(method, argument))
