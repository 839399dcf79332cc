"""The memory of this machine, and of this process."""

from __future__ import annotations

import ctypes
import functools
import re
from pathlib import Path

# Memory limit and usage of a container, in the two versions of Linux's cgroups.
_CGROUPS = (
    ("memory.max", "memory.current"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
)


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


def release_freed_memory() -> None:
    """Returns freed memory to the system, on Linux with the C library of GNU.

    That library keeps freed blocks of up to 32 MB to allocate them again, which are
    hundreds of megabytes after weights have been freed. It takes milliseconds.

    Example:
        >>> release_freed_memory()
    """
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@functools.cache
def _malloc_trim():
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # Another library or system.
        return None


def _text(path):
    path = Path(path)
    return path.read_text("utf-8") if path.is_file() else ""
