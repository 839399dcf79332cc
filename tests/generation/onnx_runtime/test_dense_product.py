"""The compiled products with matrices in bfloat16."""

import ml_dtypes
import native_products
import numpy as np
import pytest

from keras_openllama.generation.onnx_runtime.file import PACKAGE_DOMAIN, OnnxGraph
from keras_openllama.native.library import (
    compile_library,
    native_library,
)

pytestmark = [pytest.mark.backend_free, native_products.needs_them]


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def multiply(matrices, x, directory, library, gated=0):
    graph = OnnxGraph()
    graph.input("x", "float32", ["batch", "rows", x.shape[-1]])
    weights = [graph.array(f"w{i}", matrix) for i, matrix in enumerate(matrices)]
    graph.add("DenseProduct", ["x", *weights], "y", PACKAGE_DOMAIN, gated=gated)
    graph.output("y", "float32", ["batch", "rows", sum(map(len, matrices))])
    return native_products.run(graph, directory, library, x)


@pytest.mark.parametrize("options", native_products.OPTIONS, ids=["native", "avx2"])
@pytest.mark.parametrize("rows", [1, 3, 6, 11, 12, 37, 129])
@pytest.mark.parametrize("outputs, inputs", [(1, 2), (17, 100), (64, 96), (33, 1030)])
def test_dense_product_multiplies_inputs_in_bfloat16(
    options, rows, outputs, inputs, tmp_path
):
    weights = random(outputs, inputs).astype(ml_dtypes.bfloat16)
    # Inputs without rounding are the same in bfloat16 and in float32.
    x = random(2, rows, inputs, seed=1).astype(ml_dtypes.bfloat16).astype("float32")
    found = multiply([weights], x, tmp_path, compile_library(options))
    expected = x.astype("float64") @ weights.astype("float64").T
    scale = np.abs(x).astype("float64") @ np.abs(weights.astype("float64")).T
    assert np.abs((found - expected) / scale).max() < 2e-6


def test_dense_product_rounds_inputs_at_most_to_bfloat16(tmp_path):
    weights = np.eye(40).astype(ml_dtypes.bfloat16)
    x = random(1, 5, 40)
    found = multiply([weights], x, tmp_path, native_library())
    rounded = x.astype(ml_dtypes.bfloat16).astype("float32")
    assert ((found == x) | (found == rounded)).all()


@pytest.mark.parametrize("rows", [1, 20])
def test_dense_product_of_not_a_number_is_not_a_number(rows, tmp_path):
    weights = random(24, 64).astype(ml_dtypes.bfloat16)
    x = np.ones((1, rows + 1, 64), "float32")
    x[0, rows, 3] = np.frombuffer(np.uint32(0x7FFFFFFF).tobytes(), "float32")[0]
    found = multiply([weights], x, tmp_path, native_library())
    assert np.isfinite(found[0, :rows]).all() and np.isnan(found[0, rows]).all()


def test_dense_product_of_other_sizes_is_an_error(tmp_path):
    weights = random(24, 64).astype(ml_dtypes.bfloat16)
    with pytest.raises(Exception, match="x and weights have other sizes"):
        multiply([weights], random(1, 2, 65), tmp_path, native_library())


@pytest.mark.parametrize("options", native_products.OPTIONS, ids=["native", "avx2"])
@pytest.mark.parametrize("rows", [1, 20])
def test_dense_product_multiplies_by_several_matrices(options, rows, tmp_path):
    matrices = [
        random(outputs, 40, seed=outputs).astype(ml_dtypes.bfloat16)
        for outputs in (5, 30, 1)
    ]
    x, library = random(2, rows, 40), compile_library(options)
    together = multiply(matrices, x, tmp_path, library)
    alone = [multiply([matrix], x, tmp_path, library) for matrix in matrices]
    assert (together == np.concatenate(alone, axis=-1)).all()


@pytest.mark.parametrize("options", native_products.OPTIONS, ids=["native", "avx2"])
@pytest.mark.parametrize("rows", [1, 20])
def test_dense_product_of_gated_inputs_is_of_swiglu(options, rows, tmp_path):
    weights = random(24, 70).astype(ml_dtypes.bfloat16)
    x, library = 5 * random(2, rows, 140), compile_library(options)
    x[0, 0, :3], x[0, 0, 70:73] = (-300, 300, 0), 1
    found = multiply([weights], x, tmp_path, library, gated=1)
    gate, up = np.split(x.astype("float64"), 2, axis=-1)
    with np.errstate(over="ignore"):
        inputs = gate / (1 + np.exp(-gate)) * up
    wanted = multiply([weights], inputs.astype("float32"), tmp_path, library)
    # A product may be rounded to the neighbour of its bfloat16.
    assert np.abs(found - wanted).max() < 2e-3 * np.abs(wanted).max()
    with pytest.raises(Exception, match="x has no two halves"):
        multiply([weights], random(1, 1, 141), tmp_path, library, gated=1)
