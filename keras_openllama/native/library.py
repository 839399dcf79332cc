"""Compiles the C sources beside this module for the processor at hand.

The system's C compiler compiles them when they are first needed, which takes about two
seconds, and the library is kept in the cache directory of this package.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

from keras_openllama.utils.files import cache_directory

SOURCES = Path(__file__).parent
_COMPILERS = ("cc", "gcc", "clang")
_OPTIONS = ("-O3", "-shared", "-fPIC", "-pthread")
_NEEDED_INSTRUCTIONS = {"avx2", "fma", "f16c"}
# Options of the compiler for the processor at hand.
NATIVE = ("-march=native",)

T = TypeVar("T")


class NativeLibrary(NamedTuple):
    """A compiled library of products and attention.

    Attributes:
        path: path of the shared library.
        lanes: number of outputs whose weights are beside each other, in a tile.
    """

    path: Path
    lanes: int


@functools.cache
def native_library() -> NativeLibrary | None:
    """Returns the library for this processor, which is compiled if it is not cached.

    Returns:
        The library, or `None`; see `if_it_compiles`.

    Example:
        >>> library = native_library()
        >>> library is None or library.lanes in (8, 16)
        True
    """
    return if_it_compiles(lambda: compile_library(NATIVE))


def if_it_compiles(compile: Callable[[], T]) -> T | None:
    """Returns what a function compiles, if this system can compile and load it.

    Args:
        compile: callable without arguments that calls `compile_sources`.

    Returns:
        Its result. `None` if this is not Linux on a processor with AVX2, or, with a
        warning, if it cannot be compiled: then libraries' own functions are used.
    """
    if sys.platform != "linux" or not _instructions() >= _NEEDED_INSTRUCTIONS:
        return None
    try:
        return compile()
    # `Path.home` raises a RuntimeError for a user without a home, `shlex` a ValueError.
    except (OSError, RuntimeError, ValueError, subprocess.SubprocessError) as error:
        reason = getattr(error, "stderr", None) or error
        warnings.warn(
            "The functions for generation and training on a CPU could not be compiled "
            "or loaded, so that it is slower. Install a C compiler, such as gcc, or "
            "set the environment variable CC to one, and XDG_CACHE_HOME to a "
            "directory from which libraries can be loaded. The reason: "
            f"{reason}",
            stacklevel=3,
        )
        return None


def compile_library(options: tuple[str, ...]) -> NativeLibrary:
    """Returns the library that a compiler makes with some options.

    Args:
        options: options of the compiler, which select the instructions.

    Raises:
        OSError: if there is no compiler, or the library cannot be written or loaded.
        subprocess.CalledProcessError: if the compiler fails.
    """
    sources = sorted(SOURCES.glob("*.[ch]"))
    path = compile_sources("products", sources, options)
    return NativeLibrary(path, ctypes.CDLL(str(path)).lanes())


def compile_sources(name: str, sources: Sequence[Path], options: Sequence[str]) -> Path:
    """Returns the path of the shared library of some sources, compiled once.

    Args:
        name: start of its file name.
        sources: C files, and the headers that they include.
        options: options of the compiler.

    Raises:
        OSError: if there is no compiler, or the library cannot be written or loaded.
        subprocess.CalledProcessError: if the compiler fails.
    """
    compiler = _compiler()
    command = [*compiler, *_OPTIONS, *options]
    # The home directory may be shared by machines with other processors.
    state = os.stat(compiler[0])
    words = [
        *command,
        *sorted(_instructions()),
        str(state.st_size),
        str(state.st_mtime),
    ]
    key = hashlib.sha256(" ".join(words).encode())
    for source in sources:
        key.update(source.read_bytes())
    path = cache_directory("native") / f"{name}-{key.hexdigest()[:16]}.so"
    with contextlib.suppress(OSError):  # It does not exist, or is damaged.
        ctypes.CDLL(str(path))
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as directory:
        output = Path(directory) / path.name
        files = [str(source) for source in sources if source.suffix == ".c"]
        command += [*files, "-lm", "-o", str(output)]
        subprocess.run(command, check=True, capture_output=True, text=True)
        os.replace(output, path)  # Another process may have compiled it, too.
    ctypes.CDLL(str(path))
    return path


def _instructions():
    """The extensions of the instruction set, on Linux on x86."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return set()
    cpus = Path("/proc/cpuinfo")
    text = cpus.read_text() if cpus.is_file() else ""
    flags = re.search(r"^flags\s*:(.*)$", text, re.MULTILINE)
    return set(flags[1].split()) if flags else set()


def _compiler():
    """The words of the command that starts the compiler."""
    given = os.environ.get("CC", "").strip()
    names = [given] if given else _COMPILERS
    for name in names:
        first, *options = shlex.split(name)
        if path := shutil.which(first):
            return [path, *options]
    raise FileNotFoundError(f"no C compiler ({', '.join(names)}) was found")
