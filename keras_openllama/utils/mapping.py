"""Files that are mapped into memory, and may be written to in memory only."""

from __future__ import annotations

import mmap
import os
import platform
import sys
import tempfile
from pathlib import Path
from typing import BinaryIO

# Python has the name since 3.13. Its value depends on the processor.
_NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)
_MACHINES = ("x86_64", "aarch64")
# Directory for large temporary files of Linux. Many systems keep /tmp in memory.
_ON_DISK = Path("/var/tmp")


def map_privately(file: BinaryIO) -> mmap.mmap:
    """Maps a file so that writing to the memory never changes the file.

    Its pages are in the page cache of the system, which frees them when memory is
    short and reads them again. Pages that are written to become memory of the process.

    Args:
        file: File that is open for reading, and is not empty. It may be closed after.

    Returns:
        The mapping, which is writable.

    Raises:
        OSError: If the file cannot be mapped.

    Example:
        >>> with tempfile.TemporaryFile() as file:
        ...     _ = file.write(b"abc")
        ...     file.flush()
        ...     memory = map_privately(file)
        >>> memory[:2] = b"AB"
        >>> bytes(memory)
        b'ABc'
    """
    descriptor = file.fileno()
    if sys.platform != "linux" or platform.machine() not in _MACHINES:
        return mmap.mmap(descriptor, 0, access=mmap.ACCESS_COPY)
    # Without reservation, since all pages could be written to, and Linux refuses a
    # mapping that is larger than the memory.
    return mmap.mmap(
        *(descriptor, 0),
        flags=mmap.MAP_PRIVATE | _NO_RESERVE,
        prot=mmap.PROT_READ | mmap.PROT_WRITE,
    )


def large_files_directory() -> str:
    """Returns the directory for temporary files that shall not take memory.

    It is that of the environment variable `TMPDIR`; without it, `/var/tmp`, where there
    is one, since `/tmp` is in memory on many systems.

    Example:
        >>> Path(large_files_directory()).is_dir()
        True
    """
    names = ("TMPDIR", "TEMP", "TMP")
    if any(os.environ.get(name) for name in names) or not os.access(_ON_DISK, os.W_OK):
        return tempfile.gettempdir()
    return str(_ON_DISK)
