"""The compiled products with quantized matrices, and the order of their weights."""

import native_products
import numpy as np
import pytest

from keras_openllama.generation.onnx_runtime.file import (
    PACKAGE_DOMAIN,
    OnnxGraph,
    Weight,
)
from keras_openllama.generation.onnx_runtime.matrices import JoinedMatrix
from keras_openllama.generation.onnx_runtime.tiles import TiledMatrix
from keras_openllama.native.library import (
    compile_library,
    native_library,
)
from keras_openllama.quantization.rounding import quantize_matrix

pytestmark = [pytest.mark.backend_free, native_products.needs_them]


def random_matrix(outputs, inputs, bits, group_size):
    weights = np.random.default_rng(0).normal(0.1, 1, (outputs, inputs))
    return quantize_matrix(weights.astype("float32"), bits, group_size)


def multiply(joined, x, directory, library, gated=0):
    """The product of the compiled library, called by ONNX Runtime."""
    graph, tiles = OnnxGraph(), TiledMatrix(joined, library.lanes)
    graph.input("x", "float32", ["batch", "rows", x.shape[-1]])
    words = Weight(tiles.words_shape, "uint8", tiles.words, in_memory=True)
    scales = Weight(tiles.scales_shape, "float16", tiles.scales, in_memory=True)
    graph.add(
        "QuantizedProduct",
        ["x", graph.weight("words", words), graph.weight("scales", scales)],
        *("y", PACKAGE_DOMAIN),
        bits=joined.bits,
        N=joined.shape[0],
        groups_per_scale=tiles.groups_per_scale,
        gated=gated,
    )
    graph.output("y", "float32", ["batch", "rows", joined.shape[0]])
    return native_products.run(graph, directory, library, x)


def rounded(x):
    """`x` with 8 bits in each group of 32."""
    missing = -x.shape[-1] % 32
    groups = np.pad(x, ((0, 0), (0, 0), (0, missing))).reshape(*x.shape[:2], -1, 32)
    largest = np.abs(groups).max(-1, keepdims=True)
    inverse = np.where(largest > 0, 127 / np.maximum(largest, 1e-30), 0)
    integers = np.rint(groups * inverse.astype("float32"))
    return (integers * (largest / 127)).reshape(*x.shape[:2], -1)[..., : x.shape[-1]]


@pytest.mark.parametrize("options", native_products.OPTIONS, ids=["native", "avx2"])
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
        for options in native_products.OPTIONS:
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


@pytest.mark.parametrize("rows", [1, 20])
def test_quantized_product_of_gated_inputs_is_of_swiglu(rows, tmp_path):
    joined = JoinedMatrix([random_matrix(24, 70, 8, 32)])
    library = native_library()
    x = np.random.default_rng(1).normal(size=(2, rows, 140)).astype("float32")
    found = multiply(joined, x, tmp_path, library, gated=1)
    gate, up = np.split(x.astype("float64"), 2, axis=-1)
    inputs = (gate / (1 + np.exp(-gate)) * up).astype("float32")
    wanted = multiply(joined, inputs, tmp_path, library)
    # A rounded input may be the neighbouring integer.
    assert np.abs(found - wanted).max() < 1e-2 * np.abs(wanted).max()
