"""Locks between processes of a machine, released when the process ends."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator

from keras_openllama.utils.types import PathLike

try:
    import fcntl
except ImportError:  # Windows, where files are written without locks.
    fcntl = None

# Windows also cannot open directories, and flushes only files open for writing.
IS_POSIX = fcntl is not None


def try_lock(descriptor: int) -> bool | None:
    """Takes the exclusive lock of an open file or directory without waiting.

    Args:
        descriptor: Descriptor of an open file or directory. Closing it releases the
            lock.

    Returns:
        `True` if the lock was taken, `False` if another process holds it, `None` if the
        file system or the platform does not support locks.
    """
    if not IS_POSIX:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return False if error.errno in (errno.EWOULDBLOCK, errno.EACCES) else None
    return True


@contextlib.contextmanager
def locked(path: PathLike, busy: BaseException) -> Iterator[None]:
    """Holds the exclusive lock of a file or directory inside the block.

    If the file system or the platform (Windows) does not support locks, the block runs
    without one.

    Args:
        path: Path of a directory, or of a file, which is created if missing.
        busy: Exception to raise if another process holds the lock.

    Example:
        >>> with locked("lock", RuntimeError("Another process holds the lock.")):
        ...     print("This process holds it.")
        This process holds it.
    """
    if not IS_POSIX:
        yield
        return
    mode = os.O_RDONLY if os.path.isdir(path) else os.O_RDWR | os.O_CREAT
    descriptor = os.open(path, mode, 0o644)
    try:
        if try_lock(descriptor) is False:
            raise busy
        yield
    finally:
        os.close(descriptor)
