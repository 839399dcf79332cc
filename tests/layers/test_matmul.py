"""Products with a transposed kernel: each order of operands gives the same."""

import keras
import ml_dtypes
import numpy as np
import pytest
from keras import ops

from keras_openllama.layers import matmul
from keras_openllama.layers.matmul import MANY_ROWS, OUTPUT_BLOCK, matmul_transposed


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


# One row, a few, some and many; outputs with and without a remainder of a block.
SHAPES = [(1, 1), (3, 1), (1, 5), (2, 20), (2, MANY_ROWS)]


@pytest.mark.parametrize("units", [2 * OUTPUT_BLOCK, 2 * OUTPUT_BLOCK + 10])
@pytest.mark.parametrize("shape", SHAPES)
def test_matmul_transposed_equals_numpy(shape, units):
    x, kernel = random(*shape, 100), random(units, 100, seed=1)
    y = matmul_transposed(ops.convert_to_tensor(x), ops.convert_to_tensor(kernel))
    assert y.shape == (*shape, units)
    np.testing.assert_allclose(ops.convert_to_numpy(y), x @ kernel.T, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_matmul_transposed_rounds_bfloat16_once_at_the_end(shape):
    x, kernel = random(*shape, 256), random(OUTPUT_BLOCK, 256, seed=1)
    y = matmul_transposed(ops.cast(x, "bfloat16"), ops.cast(kernel, "bfloat16"))
    assert keras.backend.standardize_dtype(y.dtype) == "bfloat16"
    x, kernel = (a.astype(ml_dtypes.bfloat16).astype("float32") for a in (x, kernel))
    # Half a unit in the last of bfloat16's 8 bits, and the error of float32 sums.
    np.testing.assert_allclose(
        ops.convert_to_numpy(ops.cast(y, "float32")),
        x @ kernel.T,
        rtol=2**-8,
        atol=1e-4,
    )


@pytest.mark.skipif(keras.config.backend() != "torch", reason="Needs PyTorch.")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("has_onednn", [True, False])
def test_matmul_transposed_with_and_without_onednn(
    shape, dtype, has_onednn, monkeypatch
):
    monkeypatch.setattr(matmul, "has_onednn_products", lambda dtype: has_onednn)
    x, kernel = (ops.cast(random(*size), dtype) for size in ((*shape, 256), (96, 256)))
    y = matmul_transposed(x, kernel)
    assert keras.backend.standardize_dtype(y.dtype) == dtype
    x, kernel, y = (
        ops.convert_to_numpy(ops.cast(a, "float32")) for a in (x, kernel, y)
    )
    np.testing.assert_allclose(y, x @ kernel.T, rtol=2**-8, atol=1e-2)


@pytest.mark.skipif(keras.config.backend() != "jax", reason="Needs JAX.")
def test_the_gradient_of_matmul_transposed_makes_no_transposed_copies_on_a_cpu():
    import jax

    def gradient(x, kernel, slopes):
        return jax.vjp(lambda kernel: matmul_transposed(x, kernel), kernel)[1](slopes)

    arguments = random(2, MANY_ROWS, 16), random(24, 16), random(2, MANY_ROWS, 24)
    program = jax.jit(gradient).lower(*arguments).compile().as_text()
    assert " dot(" in program
    assert " transpose(" not in program and " copy(" not in program
