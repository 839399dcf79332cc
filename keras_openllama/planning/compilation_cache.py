"""Finished compilations on disk: what a plan needs of a program for absent TPUs.

JAX's own cache cannot serve these programs, since it loads them onto devices.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import logging
import os
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from keras_openllama.utils.files import cache_directory
from keras_openllama.utils.staging import staged_files
from keras_openllama.utils.types import PathLike

# Heuristic: a step of 7B has 0.5 MB. The least recently used ones are removed.
MAX_BYTES = 256 << 20
_SUFFIX = ".json.z"
# Both change what the compiler does.
_ENVIRONMENT = ("LIBTPU_INIT_ARGS", "XLA_FLAGS")


def program_key(
    lowered: jax.stages.Lowered,
    devices: Sequence[Any],
    options: Mapping[str, str] | None = None,
) -> str:
    """Returns a hash of all that determines the result of a compilation.

    Args:
        lowered: the program.
        devices: the devices to compile for, in the order of the mesh.
        options: compiler options.

    Returns:
        SHA-256 in hexadecimal, of the program's text, the devices, the options, the
        versions of JAX and of the TPU compiler, and the environment variables that
        change the compiler's options.

    Example:
        >>> import jax
        >>> lowered = jax.jit(lambda x: x + 1).lower(jax.ShapeDtypeStruct((), "int32"))
        >>> len(program_key(lowered, jax.devices()))
        64
    """
    parts = {
        "program": lowered.as_text(),
        "devices": [(d.device_kind, d.id, getattr(d, "coords", None)) for d in devices],
        "options": dict(options or {}),
        "versions": {name: _version(name) for name in ("jax", "jaxlib", "libtpu")},
        "environment": {name: os.environ.get(name) for name in _ENVIRONMENT},
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _version(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


class CompilationCache:
    """Dicts by key, in one compressed file each.

    It is a convenience: a file that cannot be read or written is as one that is
    missing.

    Args:
        directory: defaults to `plans` in the package's cache directory,
            `~/.cache/keras_openllama` or that of `$XDG_CACHE_HOME`.
        max_bytes: size of all files, above which the least recently used are removed.

    Example:
        >>> cache = CompilationCache("cache")
        >>> cache.save("a1", {"peak_memory": 123})
        >>> cache.load("a1"), cache.load("b2")
        ({'peak_memory': 123}, None)
    """

    def __init__(self, directory: PathLike | None = None, max_bytes: int = MAX_BYTES):
        self.directory = Path(directory or cache_directory("plans"))
        self.max_bytes = max_bytes
        self._has_warned = False

    def load(self, key: str) -> dict[str, Any] | None:
        """Returns an entry; `None` if it is missing or damaged."""
        path = self._path(key)
        try:
            entry = json.loads(zlib.decompress(path.read_bytes()))
        except (OSError, ValueError, zlib.error):
            return None
        with contextlib.suppress(OSError):  # A cache may be read-only.
            os.utime(path)  # It was used now.
        return entry if isinstance(entry, dict) else None

    def save(self, key: str, entry: Mapping[str, Any]) -> None:
        """Writes an entry atomically; logs a warning, once, if that fails.

        It also removes what a killed process left behind.
        """
        path = self._path(key)
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            with staged_files(self.directory, path) as unfinished:
                data = zlib.compress(json.dumps(entry).encode())
                (unfinished / path.name).write_bytes(data)
            self._remove_old_entries()
        except OSError as error:
            if not self._has_warned:
                logging.getLogger(__name__).warning(
                    "Compiled steps are not saved for the next plan: %s. Set "
                    "XDG_CACHE_HOME to a directory that can be written, or pass "
                    "--no-plan-cache.",
                    error,
                )
            self._has_warned = True

    def _path(self, key):
        return self.directory / f"{key}{_SUFFIX}"

    def _remove_old_entries(self):
        """Removes the least recently used entries beyond `max_bytes`."""
        stats = []
        for path in self.directory.glob(f"*{_SUFFIX}"):
            with contextlib.suppress(FileNotFoundError):  # Removed by another process.
                stat = path.stat()
                stats.append((stat.st_mtime_ns, stat.st_size, path))
        total = sum(size for _, size, _ in stats)
        for _, size, path in sorted(stats):
            if total <= self.max_bytes:
                break
            with contextlib.suppress(OSError):  # As above, or another user's.
                path.unlink()
            total -= size
