"""Free memory on Linux and in containers, and memory that is freed."""

import platform
import resource
import sys

import numpy as np
import pytest

from keras_openllama.utils import host_memory as module
from keras_openllama.utils.host_memory import (
    allocate_block,
    free_memory,
    keeping_freed_memory,
    release_freed_memory,
)

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


def page_faults(work):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    work()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def use_memory():
    for _ in range(8):
        np.ones(16 << 20, "int8")


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="Needs the GNU C library."
)
def test_keeping_freed_memory_spares_page_faults_until_its_end(monkeypatch):
    for name in [name for name in module.os.environ if name.startswith("MALLOC_")]:
        monkeypatch.delenv(name)
    with keeping_freed_memory():
        use_memory()
        assert page_faults(use_memory) < 100
        kept = module._text("/proc/self/statm").split()[1]
    # Eight times 16 MiB have 32,768 pages of 4 KiB.
    assert int(module._text("/proc/self/statm").split()[1]) < int(kept) - 2000


def test_keeping_freed_memory_leaves_the_limits_of_the_environment(monkeypatch):
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "1000")
    monkeypatch.setattr(module, "_glibc", lambda: pytest.fail("mallopt was called."))
    with keeping_freed_memory():
        pass


def test_keeping_freed_memory_does_nothing_with_another_c_library(monkeypatch):
    monkeypatch.setattr(module.ctypes, "CDLL", lambda name: object())
    monkeypatch.setattr(module.os, "environ", {})
    with keeping_freed_memory():
        pass


def test_allocate_block_gives_aligned_parts_of_one_array():
    parts = allocate_block([3, 64, 100])
    assert [len(part) for part in parts] == [3, 64, 100]
    assert all(part.ctypes.data % 64 == 0 for part in parts)
    for value, part in enumerate(parts):
        part[:] = value
    assert all((part == value).all() for value, part in enumerate(parts))
    assert len({id(part.base) for part in parts}) == 1
    assert allocate_block([]) == []
