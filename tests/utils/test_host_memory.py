"""Free memory on Linux and in containers, and memory that the process returns."""

import platform
import sys

import numpy as np
import pytest

from keras_openllama.utils import host_memory as module
from keras_openllama.utils.host_memory import free_memory, release_freed_memory

pytestmark = pytest.mark.backend_free


@pytest.mark.skipif(sys.platform != "linux", reason="Needs Linux.")
def test_free_memory_is_at_most_the_total_memory():
    total = int(module._text("/proc/meminfo").split()[1]) * 1024
    assert 0 < free_memory() <= total


def test_free_memory_respects_the_limit_of_a_container(monkeypatch):
    files = {
        "/proc/meminfo": "MemTotal: 9 kB\nMemAvailable:   2048 kB\n",
        "/sys/fs/cgroup/memory.max": "1048576\n",
        "/sys/fs/cgroup/memory.current": "48576\n",
    }
    monkeypatch.setattr(module, "_text", lambda path: files.get(str(path), ""))
    assert free_memory() == 1_000_000
    files["/sys/fs/cgroup/memory.max"] = "max\n"
    assert free_memory() == 2048 * 1024
    files.clear()
    assert free_memory() is None


def anonymous_memory():
    """Memory of this process that no file backs, in bytes."""
    lines = module._text("/proc/self/status").splitlines()
    (line,) = [line for line in lines if line.startswith("RssAnon")]
    return int(line.split()[1]) * 1024


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="Needs glibc.")
def test_release_freed_memory_returns_it_to_the_system():
    arrays = [np.ones(10_000) for _ in range(1000)]  # Too small to be mapped.
    arrays = arrays[-1:]  # Frees all that is below the last in the heap.
    before = anonymous_memory()
    release_freed_memory()
    assert before - anonymous_memory() > 60_000_000
    assert arrays[0].sum() == 10_000
