"""What the commands do to their process: backend, memory pages, noise on stderr."""

import contextlib
import importlib.util
import os
import re
import sys
import tempfile
import time

PROGRAM = "keras-openllama"
# When the process began, in seconds of `time.monotonic`; before Keras is imported.
START = time.monotonic()
# The module that each backend's package is imported as.
BACKENDS = {"jax": "jax", "tensorflow": "tensorflow", "torch": "torch"}
_TENSORFLOW_REPORT = re.compile(rb"WARNING: All log messages before absl|I\d{4} ")


def add_backend(group):
    """Adds the flag `--backend`, for `choose_backend`, to a parser or its group."""
    group.add_argument(
        "--backend",
        choices=BACKENDS,
        help="what Keras computes with (KERAS_BACKEND, or else jax)",
    )


def choose_backend(name):
    """Sets Keras's backend, before anything has imported Keras.

    Args:
        name: string, or `None` for that of KERAS_BACKEND, or else JAX.

    Raises:
        ValueError: if the backend is not installed, or Keras is imported with another.
    """
    name = name or os.environ.get("KERAS_BACKEND") or "jax"
    if name in BACKENDS and importlib.util.find_spec(BACKENDS[name]) is None:
        extra = "[torch]" if name == "torch" else ""
        raise ValueError(
            f"The backend {name!r} is not installed: "
            f"pip install 'keras-openllama{extra}' brings it."
        )
    if "keras" in sys.modules and sys.modules["keras"].config.backend() != name:
        raise ValueError(
            f"--backend {name} comes too late: this process has imported Keras with "
            f"{sys.modules['keras'].config.backend()!r} already."
        )
    os.environ["KERAS_BACKEND"] = name
    # TensorFlow and XLA report what they do on stderr.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


@contextlib.contextmanager
def quiet_tensorflow():
    """Drops what TensorFlow's C++ code reports of itself when it is imported.

    Setting TF_CPP_MIN_LOG_LEVEL does not reach the messages that it writes before its
    logging is set up. Everything else on stderr is passed on after the import.
    """
    if os.environ["KERAS_BACKEND"] != "tensorflow":
        yield
        return
    stderr = os.dup(2)
    with tempfile.TemporaryFile() as caught:
        os.dup2(caught.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
            caught.seek(0)
            for line in caught:
                if not _TENSORFLOW_REPORT.match(line):
                    os.write(2, line)


def owns_process(arguments):
    """Whether the process was started to run this command.

    It was not where a test, a notebook or another program calls the command.

    Args:
        arguments: list of strings, the words after the command's name.
    """
    return bool(arguments) and sys.orig_argv[-len(arguments) :] == arguments


def use_large_pages():
    """Restarts the process with an allocator that asks Linux for pages of 2 MB.

    A training step on a CPU is 1.2 times as fast with them. glibc reads its settings
    only when a process starts. Where the user has set some, nothing is done.
    """
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def one_line(message):
    """The message without line breaks."""
    return " ".join(str(message).split())


def show_warning(message, category, filename, lineno, file=None, line=None):
    """Shows a warning as the program's own line, without the place in the source."""
    print(f"{PROGRAM}: {one_line(message)}", file=file or sys.stderr)
