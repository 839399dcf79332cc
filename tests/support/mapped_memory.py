"""Which weights have the memory of mapped files."""

import sys

import keras
import pytest

from keras_openllama.backend.arrays import as_numpy
from keras_openllama.backend.keras_private import stored_value

needs_mapped_weights = pytest.mark.skipif(
    sys.platform != "linux" or keras.config.backend() == "tensorflow",
    reason="Reads /proc/self/maps; TensorFlow copies.",
)


def files_of(variables):
    """The files in whose mapped memory variables are; `None` for other memory.

    Args:
        variables: Variables of JAX or PyTorch on a CPU.
    """
    ranges = []
    for line in open("/proc/self/maps", encoding="utf-8"):
        addresses, *_ = line.split()
        start, end = (int(address, 16) for address in addresses.split("-"))
        path = line[line.find("/") :].rstrip() if "/" in line else None
        ranges.append((start, end, path))
    starts = [as_numpy(stored_value(v)).ctypes.data for v in variables]
    return [
        next(path for start, end, path in ranges if start <= address < end)
        for address in starts
    ]
