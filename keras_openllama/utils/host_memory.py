"""Available memory of this machine."""

from __future__ import annotations

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


def _text(path):
    path = Path(path)
    return path.read_text("utf-8") if path.is_file() else ""
