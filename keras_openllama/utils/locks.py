"""Locks between processes of one machine, which end with their process."""

import contextlib
import errno
import os

try:
    import fcntl
except ImportError:  # Windows, where files are written without locks.
    fcntl = None

# Windows also cannot open a directory, and flushes only what is open for writing.
IS_POSIX = fcntl is not None


def try_lock(descriptor):
    """Takes the exclusive lock of an open file or directory without waiting.

    Args:
        descriptor: int, of an open file or directory. Closing it ends the lock.

    Returns:
        `True` if the lock was taken, `False` if another process holds it, `None` if the
        file system or the platform has no locks.
    """
    if not IS_POSIX:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return False if error.errno in (errno.EWOULDBLOCK, errno.EACCES) else None
    return True


@contextlib.contextmanager
def locked(path, busy):
    """Holds the exclusive lock of a file or directory inside the block.

    Where the file system or the platform (Windows) has no locks, the block runs without
    one.

    Args:
        path: path of a directory, or of a file that is made if it does not exist.
        busy: exception to raise if another process holds the lock.

    Example:

    ```python
    with locked("runs/nano/.lock", RuntimeError("Another process trains here.")):
        train()
    ```
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
