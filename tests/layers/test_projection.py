"""Projections: each order of operands gives the same product."""

import keras
import ml_dtypes
import numpy as np
import pytest
from keras import ops

from keras_openllama.layers.projection import (
    MANY_ROWS,
    OUTPUT_BLOCK,
    Projection,
    matmul_transposed,
)


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


# One row, a few and many; outputs with and without a remainder of a block.
SHAPES = [(1, 1), (3, 1), (1, 5), (2, MANY_ROWS)]


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


@pytest.mark.parametrize("shape", SHAPES)
def test_projection_gradients_equal_numpy(shape):
    layer = Projection(OUTPUT_BLOCK, initializer_std=0.02)
    model = keras.Sequential([keras.Input((None, 30)), layer])
    before = ops.convert_to_numpy(layer.kernel)
    x = random(*shape, 30)
    model.compile(
        keras.optimizers.SGD(1.0),
        loss=lambda target, y: ops.sum(target * y),
        run_eagerly=False,
    )
    target = random(*shape, OUTPUT_BLOCK, seed=2)
    model.fit(x, target, batch_size=shape[0], verbose=0)
    gradient = before - ops.convert_to_numpy(layer.kernel)
    expected = np.einsum("bto,bti->oi", target, x)
    np.testing.assert_allclose(gradient, expected, atol=1e-3)


def test_projection_is_restored_from_its_config():
    layer = Projection(7, initializer_std=0.5, name="up", dtype="bfloat16")
    copy = Projection.from_config(layer.get_config())
    copy.build((None, None, 5))
    assert copy.get_config() == layer.get_config()
    assert tuple(copy.kernel.shape) == (7, 5)
    assert copy.kernel.dtype == "bfloat16"
