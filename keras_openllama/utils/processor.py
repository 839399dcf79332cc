"""The processor of this machine."""

from __future__ import annotations

import contextlib
import functools
import platform
from pathlib import Path


@functools.cache
def is_amd() -> bool:
    """Returns whether the processor is one of AMD's.

    Example:
        >>> is_amd() in (True, False)
        True
    """
    described = Path("/proc/cpuinfo")  # Of Linux, whose `platform` does not tell.
    text = ""
    with contextlib.suppress(OSError):
        text = described.read_text("utf-8", errors="replace")
    return "AuthenticAMD" in (text or platform.processor())
