"""The process of a command: backend, memory pages, messages on stderr."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import sys
import time
from collections.abc import Iterator, Sequence

from keras_openllama.backend.quiet import quiet_tensorflow_import

PROGRAM = "keras-openllama"
# Start of the process, in seconds of `time.monotonic`; before Keras is imported.
START = time.monotonic()
# Backend -> module to import.
BACKENDS = {"jax": "jax", "tensorflow": "tensorflow", "torch": "torch"}


def add_backend(group: argparse._ActionsContainer) -> None:
    """Adds the flag `--backend`, for `choose_backend`, to a parser or a group.

    Example:
        >>> parser = argparse.ArgumentParser()
        >>> add_backend(parser)
        >>> parser.parse_args(["--backend", "torch"]).backend
        'torch'
    """
    group.add_argument(
        "--backend",
        choices=BACKENDS,
        help="the backend of Keras (default: the environment variable KERAS_BACKEND, "
        "else jax)",
    )


def backend_name(name: str | None) -> str:
    """Returns the backend of a command.

    Args:
        name: Value of `--backend`. `None` stands for KERAS_BACKEND, and JAX if that is
            not set.

    Example:
        >>> backend_name("torch")
        'torch'
    """
    return name or os.environ.get("KERAS_BACKEND") or "jax"


def choose_backend(name: str | None) -> None:
    """Sets the backend of Keras, before Keras is imported.

    Args:
        name: See `backend_name`.

    Raises:
        ValueError: If the backend is not installed, or Keras was already imported with
            another backend.
    """
    name = backend_name(name)
    if name in BACKENDS and importlib.util.find_spec(BACKENDS[name]) is None:
        extra = "[torch]" if name == "torch" else ""
        raise ValueError(
            f"The backend {name!r} is not installed. Install it with: "
            f"pip install 'keras-openllama{extra}'"
        )
    if "keras" in sys.modules and sys.modules["keras"].config.backend() != name:
        raise ValueError(
            f"--backend {name} has no effect: this process has already imported Keras "
            f"with the backend {sys.modules['keras'].config.backend()!r}. Start a new "
            "process."
        )
    os.environ["KERAS_BACKEND"] = name
    # Suppresses the log messages of TensorFlow and XLA on stderr.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


@contextlib.contextmanager
def quiet_tensorflow() -> Iterator[None]:
    """Suppresses the messages that TensorFlow's C++ code logs when it is imported.

    With another backend, Keras imports it later, if at all.
    """
    if os.environ["KERAS_BACKEND"] != "tensorflow":
        yield
        return
    with quiet_tensorflow_import():
        yield


@contextlib.contextmanager
def tolerate_closed_stdout() -> Iterator[None]:
    """Ends the block silently if the reader of stdout has gone, as in `| head`."""
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        discard_stdout()


def discard_stdout() -> None:
    """Discards what is still to be written to a closed stdout.

    Otherwise Python reports the closed pipe again when it flushes stdout at exit.
    """
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def owns_process(arguments: Sequence[str]) -> bool:
    """Whether the process was started to run this command.

    It was not if a test, a notebook or another program calls the command.

    Args:
        arguments: The arguments after the command's name.
    """
    return bool(arguments) and sys.orig_argv[-len(arguments) :] == arguments


def print_unencodable_as_question_marks() -> None:
    """Keeps `print` from failing where stdout's encoding lacks a character.

    An encoding other than UTF-8 is common for pipes on Windows, and on Linux with the
    locale C or `PYTHONIOENCODING`. Stderr prints escape sequences already.
    """
    if hasattr(sys.stdout, "reconfigure"):  # Notebooks replace stdout.
        sys.stdout.reconfigure(errors="replace")


def use_large_pages() -> None:
    """Restarts the process with an allocator that asks Linux for pages of 2 MB.

    A training step on a CPU takes 7 % less time with them. glibc reads its settings
    only at the start of a process. If the user has set some, nothing happens.
    """
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
