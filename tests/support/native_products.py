"""Runs graphs with the compiled products in ONNX Runtime."""

import platform
import sys

import pytest

from keras_openllama.generation.onnx_runtime.decoder import open_session, ort_value
from keras_openllama.generation.onnx_runtime.file import GRAPH_FILE

# Options of the compiler: for this processor, and for one with AVX2 only.
OPTIONS = (("-march=native",), ("-mavx2", "-mfma", "-mf16c"))
needs_them = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64",
    reason="the products are compiled on Linux on x86 only",
)


def run(graph, directory, library, x):
    """Returns the only output of a graph whose only input is `x`."""
    graph.save(directory, "a product")
    values = {name: ort_value(x) for name, x in graph.arrays(directory).items()}
    session = open_session(directory / GRAPH_FILE, library, values)
    return session.run(None, {"x": x})[0]
