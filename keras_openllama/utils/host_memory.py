"""How much memory this machine can still give."""

import re
from pathlib import Path

# Limit and use of a container, in the two versions of Linux's control groups.
_CGROUPS = (
    ("memory.max", "memory.current"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
)


def free_memory():
    """What is free on Linux, within the limits of a container.

    Returns:
        int, bytes; `None` where it is not known.
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
