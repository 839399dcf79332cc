"""Projections: gradients, configuration, quantized kernels."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_openllama.layers.matmul import MANY_ROWS, OUTPUT_BLOCK
from keras_openllama.layers.projection import Projection
from keras_openllama.quantization import WeightQuantizationConfig


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


# One row, a few and many.
SHAPES = [(1, 1), (3, 1), (1, 5), (2, MANY_ROWS)]


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


# ----- Quantized kernels

CONFIGS = {
    "int8": WeightQuantizationConfig(8),
    "int8 in groups": WeightQuantizationConfig(8, group_size=32),
    "int4": WeightQuantizationConfig(4),
    "int4 with zero points": WeightQuantizationConfig(4, symmetric=False),
    "int4 by outputs": WeightQuantizationConfig(4, group_size=None),
    "int4 with a shorter group": WeightQuantizationConfig(4, group_size=48),
}


def quantized(config, units=64, inputs=80, dtype="float32", rank=0):
    layer = Projection(units, initializer_std=0.02, dtype=dtype)
    layer.build((None, None, inputs))
    layer.quantize(config=config)
    if rank:
        layer.enable_lora(rank, lora_alpha=6, a_initializer="normal")
    return layer


@pytest.mark.parametrize("kind", CONFIGS)
def test_projection_multiplies_by_its_quantized_matrix(kind):
    layer = quantized(CONFIGS[kind])
    weights = layer.quantized_matrix().dequantize()
    x = random(2, 3, 80)
    expected = x @ weights.T
    np.testing.assert_allclose(ops.convert_to_numpy(layer(x)), expected, atol=1e-5)
    assert (ops.convert_to_numpy(layer.kernel) == weights).all()
    assert layer.matrix_shape == (64, 80)
    assert not layer.trainable_variables


@pytest.mark.parametrize("dtype", ["bfloat16", "mixed_bfloat16", "float16"])
def test_projection_rounds_quantized_weights_to_the_compute_dtype_once(dtype):
    layer = quantized(CONFIGS["int4"], dtype=dtype)
    compute_dtype = dtype.removeprefix("mixed_")
    expected = ops.cast(layer.quantized_matrix().dequantize(), compute_dtype)
    found = ops.cast(layer.kernel, "float32")
    expected = ops.convert_to_numpy(ops.cast(expected, "float32"))
    assert (ops.convert_to_numpy(found) == expected).all()
    y = layer(ops.ones((1, 2, 80), compute_dtype))
    assert keras.backend.standardize_dtype(y.dtype) == compute_dtype


@pytest.mark.parametrize("kind", CONFIGS)
def test_projection_is_restored_from_its_quantized_config_and_variables(kind):
    layer = quantized(CONFIGS[kind], rank=2)
    store = {}
    layer.save_own_variables(store)
    copy = Projection.from_config(layer.get_config())
    copy.build((None, None, 80))
    assert copy.get_config() == layer.get_config()
    copy.enable_lora(2, lora_alpha=6)
    copy.load_own_variables({k: ops.convert_to_numpy(v) for k, v in store.items()})
    for found, expected in zip(copy.variables, layer.variables, strict=True):
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found.numpy(), expected.numpy())
    x = random(1, 2, 80)
    np.testing.assert_array_equal(
        ops.convert_to_numpy(copy(x)), ops.convert_to_numpy(layer(x))
    )


def test_projection_passes_gradients_to_inputs_and_adapters_of_a_quantized_kernel():
    layer = quantized(CONFIGS["int4 with zero points"], rank=2)
    first = keras.layers.Dense(80, use_bias=False, kernel_initializer="zeros")
    model = keras.Sequential([keras.Input((None, 80)), first, layer])
    x, target = random(3, 5, 80), random(3, 5, 64, seed=2)
    b = layer.lora_kernel_b.numpy()
    model.compile(keras.optimizers.SGD(1.0), lambda t, y: ops.sum(t * y))
    model.fit(x, target, batch_size=3, verbose=0)
    a = layer.lora_kernel_a.numpy()
    weights = layer.quantized_matrix().dequantize()
    # The adapters multiply zeros, so that they do not change.
    np.testing.assert_array_equal(layer.lora_kernel_b.numpy(), b)
    expected = -np.einsum("bti,bto->io", x, target @ (weights + 3 * a @ b))
    np.testing.assert_allclose(first.kernel.numpy(), expected, rtol=1e-3, atol=1e-3)


def test_projection_merges_adapters_into_a_quantized_kernel():
    layer = quantized(CONFIGS["int8"], rank=2)
    a, b = layer.lora_kernel_a.numpy(), layer.lora_kernel_b.numpy()
    expected = layer.quantized_matrix().dequantize() + 3 * a @ b
    np.testing.assert_allclose(layer.merged_kernel(), expected, atol=1e-6)
    np.testing.assert_allclose(ops.convert_to_numpy(layer.kernel), expected, atol=1e-6)


def test_projection_quantized_to_int8_is_saved_as_int8_only():
    layer = quantized(CONFIGS["int8"])
    assert [v.path.split("/")[-1] for v in layer.variables] == [
        "kernel",
        "kernel_scale",
    ]
    assert [v.dtype for v in layer.variables] == ["int8", "float16"]
    with pytest.raises(ValueError, match="already quantized"):
        layer.quantize("int4")


def test_projection_rejects_arrays_of_another_quantization():
    store = {}
    quantized(CONFIGS["int4"]).save_own_variables(store)
    arrays = {name: ops.convert_to_numpy(value) for name, value in store.items()}
    for kind in ("int8", "int4 by outputs", "int4 with zero points"):
        with pytest.raises(ValueError, match="another quantization"):
            quantized(CONFIGS[kind]).load_own_variables(arrays)
