"""Silences messages of Keras and TensorFlow that a user can do nothing about."""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
import warnings
from collections.abc import Iterator

_TENSORFLOW_REPORT = re.compile(rb"WARNING: All log messages before absl|I\d{4} ")
# Layers without weights, which Keras visits nevertheless.
_NOT_QUANTIZED = r"Layer (InputLayer|OpenLlama\w+) does not have a `quantize` method"


@contextlib.contextmanager
def quiet_tensorflow_import() -> Iterator[None]:
    """Suppresses the messages that TensorFlow's C++ code logs when it is imported.

    TF_CPP_MIN_LOG_LEVEL has no effect on messages that it writes before its logging is
    set up. All other messages on stderr are printed after the import.
    """
    with (
        tempfile.TemporaryDirectory() as directory,
        open(os.path.join(directory, "stderr"), "w+b") as captured,
    ):
        stderr = os.dup(2)
        os.dup2(captured.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
            captured.seek(0)
            for line in captured:
                if not _TENSORFLOW_REPORT.match(line):
                    os.write(2, line)


def ignore_quantize_warnings() -> None:
    """Ignores Keras's warnings that layers without weights are not quantized."""
    warnings.filterwarnings("ignore", message=_NOT_QUANTIZED, category=UserWarning)
