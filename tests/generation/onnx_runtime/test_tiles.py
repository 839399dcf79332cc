"""The compiled products with quantized matrices, and the order of their weights."""

import platform
import subprocess
import sys

import numpy as np
import onnxruntime
import pytest

from keras_openllama.generation.onnx_runtime import native_library as library_module
from keras_openllama.generation.onnx_runtime.decoder import open_session
from keras_openllama.generation.onnx_runtime.file import (
    GRAPH_FILE,
    OURS,
    OnnxGraph,
    Weight,
)
from keras_openllama.generation.onnx_runtime.matrices import JoinedMatrix
from keras_openllama.generation.onnx_runtime.native_library import (
    compile_library,
    native_library,
)
from keras_openllama.generation.onnx_runtime.tiles import TiledMatrix
from keras_openllama.quantization.rounding import quantize_matrix

AVX2 = ("-mavx2", "-mfma", "-mf16c")
pytestmark = [
    pytest.mark.backend_free,
    pytest.mark.skipif(
        sys.platform != "linux" or platform.machine() != "x86_64",
        reason="the products are compiled on Linux on x86 only",
    ),
]


def random_matrix(outputs, inputs, bits, group_size):
    weights = np.random.default_rng(0).normal(0.1, 1, (outputs, inputs))
    return quantize_matrix(weights.astype("float32"), bits, group_size)


def multiply(joined, x, directory, library):
    """The product of the compiled library, called by ONNX Runtime."""
    graph, tiles = OnnxGraph(), TiledMatrix(joined, library.lanes)
    graph.input("x", "float32", ["batch", "rows", x.shape[-1]])
    words = Weight(tiles.words_shape, "uint8", tiles.words, in_memory=True)
    scales = Weight(tiles.scales_shape, "float16", tiles.scales, in_memory=True)
    graph.add(
        "QuantizedProduct",
        ["x", graph.weight("words", words), graph.weight("scales", scales)],
        *("y", OURS),
        bits=joined.bits,
        N=joined.shape[0],
        groups_per_scale=tiles.groups_per_scale,
    )
    graph.output("y", "float32", ["batch", "rows", joined.shape[0]])
    graph.save(directory, "a product")
    arrays = graph.read_to_memory(directory)
    values = {k: onnxruntime.OrtValue.ortvalue_from_numpy(a) for k, a in arrays.items()}
    session = open_session(directory / GRAPH_FILE, library, values)
    return session.run(None, {"x": x})[0]


def rounded(x):
    """`x` with 8 bits in each group of 32."""
    missing = -x.shape[-1] % 32
    groups = np.pad(x, ((0, 0), (0, 0), (0, missing))).reshape(*x.shape[:2], -1, 32)
    largest = np.abs(groups).max(-1, keepdims=True)
    inverse = np.where(largest > 0, 127 / np.maximum(largest, 1e-30), 0)
    integers = np.rint(groups * inverse.astype("float32"))
    return (integers * (largest / 127)).reshape(*x.shape[:2], -1)[..., : x.shape[-1]]


@pytest.mark.parametrize("options", [("-march=native",), AVX2], ids=["native", "avx2"])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("group_size", [None, 32, 64, 96, 512])
@pytest.mark.parametrize("inputs, rows", [(64, 1), (100, 3), (1000, 19), (576, 130)])
def test_quantized_product_multiplies_rounded_inputs_exactly(
    options, bits, group_size, inputs, rows, tmp_path
):
    matrices = [random_matrix(n, inputs, bits, group_size) for n in (37, 16, 1)]
    x = np.random.default_rng(1).normal(0, 3, (2, rows, inputs)).astype("float32")
    x[0, 0] = 0
    joined = JoinedMatrix(matrices)
    assert joined.can_be_tiled
    found = multiply(joined, x, tmp_path, compile_library(options))
    weights = np.concatenate([matrix.dequantize() for matrix in matrices])
    expected = rounded(x) @ weights.T
    assert np.abs(found - expected).max() < 3e-6 * np.abs(expected).max()
    assert not found[0, 0].any()


def test_quantized_product_does_not_overflow_with_the_largest_weights_and_inputs(
    tmp_path,
):
    weights = np.where(np.arange(64) % 3, -1, 1) * np.ones((16, 1))
    for bits in (8, 4):
        matrix = quantize_matrix(weights.astype("float32"), bits, 32)
        x = np.sign(weights[:1, None]).astype("float32")
        for options in (("-march=native",), AVX2):
            found = multiply(
                JoinedMatrix([matrix]), x, tmp_path, compile_library(options)
            )
            expected = x @ matrix.dequantize().T
            np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_quantized_product_of_a_row_does_not_depend_on_the_others(tmp_path):
    joined = JoinedMatrix([random_matrix(40, 96, 4, 32)])
    x = np.random.default_rng(2).normal(size=(1, 23, 96)).astype("float32")
    together = multiply(joined, x, tmp_path, native_library())
    for row in range(23):
        alone = multiply(joined, x[:, row : row + 1], tmp_path, native_library())
        np.testing.assert_array_equal(alone[0, 0], together[0, row])


def test_quantized_product_of_other_sizes_is_an_error(tmp_path):
    joined = JoinedMatrix([random_matrix(40, 96, 4, 32)])
    x = np.ones((1, 2, 130), "float32")
    with pytest.raises(Exception, match="x and words have other sizes"):
        multiply(joined, x, tmp_path, native_library())


def test_quantized_product_of_not_a_number_is_not_a_number(tmp_path):
    joined = JoinedMatrix([random_matrix(40, 96, 4, 32)])
    x = np.ones((1, 2, 96), "float32")
    x[0, 1, 3] = np.nan
    found = multiply(joined, x, tmp_path, native_library())
    assert np.isfinite(found[0, 0]).all() and np.isnan(found[0, 1]).all()


@pytest.mark.parametrize("group_size, symmetric", [(48, True), (16, True), (32, False)])
def test_matrices_that_the_products_do_not_support_cannot_be_tiled(
    group_size, symmetric
):
    weights = np.random.default_rng(0).normal(size=(8, 96)).astype("float32")
    matrix = quantize_matrix(weights, 4, group_size, symmetric)
    assert not JoinedMatrix([matrix]).can_be_tiled


@pytest.fixture
def no_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    native_library.cache_clear()
    yield
    native_library.cache_clear()


@pytest.mark.parametrize("compiler", ["/nowhere/cc", "false"])
def test_native_library_without_a_compiler_warns_and_is_none(
    compiler, monkeypatch, no_cache
):
    monkeypatch.setenv("CC", compiler)
    with pytest.warns(UserWarning, match="Install a C compiler"):
        assert native_library() is None


def test_native_library_of_an_old_processor_is_none(monkeypatch, no_cache):
    monkeypatch.setattr(library_module, "_instructions", lambda: {"sse2"})
    assert native_library() is None


def test_native_library_is_compiled_once(monkeypatch, no_cache):
    calls, run = [], subprocess.run
    monkeypatch.setattr(
        library_module.subprocess,
        "run",
        lambda *a, **k: calls.append(a) or run(*a, **k),
    )
    first = native_library()
    native_library.cache_clear()
    assert native_library() == first
    assert len(calls) == 1
