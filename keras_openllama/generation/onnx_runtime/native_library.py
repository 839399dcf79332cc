"""Compiles the products with quantized matrices for the processor at hand.

The sources are in `native/`. They are compiled by the system's C compiler when they are
first needed, which takes about a second, and the library is kept in the cache directory
of this package.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import NamedTuple

from keras_openllama.utils.files import cache_directory

_SOURCES = Path(__file__).parent / "native"
_COMPILERS = ("cc", "gcc", "clang")
_OPTIONS = ("-O3", "-shared", "-fPIC")
_NEEDED_INSTRUCTIONS = {"avx2", "fma", "f16c"}


class NativeLibrary(NamedTuple):
    """A compiled library of products.

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
        The library. `None` if there is none for this system, which is not Linux on a
        processor with AVX2, or, with a warning, if it cannot be compiled: then ONNX
        Runtime's own products are used.

    Example:
        >>> library = native_library()
        >>> library is None or library.lanes in (8, 16)
        True
    """
    instructions = _instructions()
    if sys.platform != "linux" or not instructions >= _NEEDED_INSTRUCTIONS:
        return None
    try:
        return compile_library(("-march=native",))
    except (OSError, subprocess.SubprocessError) as error:
        reason = getattr(error, "stderr", None) or error
        warnings.warn(
            "The products with quantized weights could not be compiled, so that "
            "generation is slower. Install a C compiler, such as gcc, or set the "
            f"environment variable CC to one. The reason: {reason}",
            stacklevel=2,
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
    command = [_compiler(), *_OPTIONS, *options]
    sources = sorted(_SOURCES.glob("*.[ch]"))
    # The home directory may be shared by machines with other processors.
    key = hashlib.sha256(" ".join([*command, *sorted(_instructions())]).encode())
    for source in sources:
        key.update(source.read_bytes())
    directory = cache_directory("native")
    path = directory / f"products-{key.hexdigest()[:16]}.so"
    if not path.is_file():
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory) as temporary:
            output = Path(temporary) / path.name
            files = [str(source) for source in sources if source.suffix == ".c"]
            command += [*files, "-o", str(output)]
            subprocess.run(command, check=True, capture_output=True, text=True)
            os.replace(output, path)  # Another process may have compiled it, too.
    return NativeLibrary(path, ctypes.CDLL(str(path)).lanes())


def _instructions():
    """The extensions of the instruction set, on Linux on x86."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return set()
    cpus = Path("/proc/cpuinfo")
    text = cpus.read_text() if cpus.is_file() else ""
    flags = re.search(r"^flags\s*:(.*)$", text, re.MULTILINE)
    return set(flags[1].split()) if flags else set()


def _compiler():
    names = [os.environ["CC"]] if os.environ.get("CC") else _COMPILERS
    for name in names:
        if path := shutil.which(name):
            return path
    raise FileNotFoundError(f"no C compiler ({', '.join(names)}) was found")
