"""The memory of this machine, and what this process keeps of it."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import re
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

# Memory limit and usage of a container, in the two versions of Linux's cgroups.
_CGROUPS = (
    ("memory.max", "memory.current"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
)

# Of arrays in a block: a line of the cache of a processor.
_ALIGNMENT = 64

# Parameters of `mallopt`, of malloc.h of the GNU C library.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
# Those that `malloc` would reach by itself, if they were not set, and its default.
_ADAPTED = {
    _MMAP_THRESHOLD: 32 << 20,
    _TRIM_THRESHOLD: 64 << 20,
    _MMAP_MAX: 65536,
}
_LOCK = threading.Lock()
_keeping = 0  # Blocks of `keeping_freed_memory` that run.


def free_memory() -> int | None:
    """Returns the available memory on Linux, within the limits of a container.

    Returns:
        Bytes, or `None` if the amount is unknown.

    Example:
        >>> memory = free_memory()
        >>> memory is None or memory > 0
        True
    """
    free = re.search(r"MemAvailable:\s*(\d+) kB", _text("/proc/meminfo"))
    if free is None:
        return None
    size = int(free[1]) * 1024
    for names in _CGROUPS:
        limit, used = (_text(f"/sys/fs/cgroup/{name}").strip() for name in names)
        if limit.isdigit() and used.isdigit():
            size = min(size, int(limit) - int(used))
    return size


def allocate_block(sizes: Sequence[int]) -> list[np.ndarray]:
    """Allocates arrays beside each other, for which NumPy asks Linux for large pages.

    Args:
        sizes: Their sizes in bytes.

    Returns:
        Arrays uint8, whose memory is that of one array, their `base`. Each begins at a
        multiple of 64 bytes: JAX does not share memory of less alignment.

    Example:
        >>> [len(array) for array in allocate_block([3, 100])]
        [3, 100]
    """
    spaces = [size + -size % _ALIGNMENT for size in sizes]
    block = np.empty(_ALIGNMENT + sum(spaces), "uint8")
    start = -block.ctypes.data % _ALIGNMENT
    starts = itertools.accumulate(spaces, initial=start)
    return [block[i : i + size] for i, size in zip(starts, sizes, strict=False)]


def release_freed_memory() -> None:
    """Returns freed memory to the system, on Linux with the C library of GNU.

    That library keeps freed blocks of up to 32 MB to allocate them again, which are
    hundreds of megabytes after weights have been freed. It takes milliseconds.

    Example:
        >>> release_freed_memory()
    """
    if libc := _glibc():
        libc.malloc_trim(0)


@contextlib.contextmanager
def keeping_freed_memory() -> Iterator[None]:
    """Makes the C library keep memory that is freed for later allocations.

    By default, it returns large arrays to the system, and each page of the next array
    costs a page fault. At the end of the block, the memory is returned. It changes
    nothing if there is another C library, or an environment variable sets the limits.

    Example:
        >>> with keeping_freed_memory():
        ...     total = sum(range(10))
    """
    global _keeping
    libc = None if _environment_sets_limits() else _glibc()
    if libc is None:
        yield
        return
    with _LOCK:
        _keeping += 1
        libc.mallopt(_MMAP_MAX, 0)
        libc.mallopt(_TRIM_THRESHOLD, -1)
    try:
        yield
    finally:
        with _LOCK:
            _keeping -= 1
            if not _keeping:
                for parameter, value in _ADAPTED.items():
                    libc.mallopt(parameter, value)
                release_freed_memory()


def _environment_sets_limits():
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    return (
        any(name.startswith("MALLOC_") for name in os.environ)
        or "malloc.mmap" in tunables
        or "malloc.trim" in tunables
    )


def _glibc():
    """Returns the C library if it is that of GNU, else `None`."""
    try:
        libc = ctypes.CDLL(None)
    except (OSError, TypeError):  # On Windows.
        return None
    return libc if hasattr(libc, "gnu_get_libc_version") else None


def _text(path):
    path = Path(path)
    return path.read_text("utf-8") if path.is_file() else ""
