"""Keys and values of 8 bits, and attention over them."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_openllama.layers import quantized_cache
from keras_openllama.layers.cached_attention import (
    CACHE_BLOCK,
    MASKED_SCORE,
    attend_cached,
)
from keras_openllama.layers.quantized_cache import (
    as_stored,
    attend_quantized,
    quantize_heads,
    write_to_cache,
)

HEADS = [((4, 2), 16), ((3, 3), 100)]


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def dequantized(integers, scales):
    integers, scales = map(ops.convert_to_numpy, (integers, scales))
    return integers.astype("float32") / 128 * scales[..., None]


def empty_cache(rows, columns, head_dim):
    cache = tuple(ops.zeros((rows, columns, head_dim), "int8") for _ in "kv")
    return cache + tuple(ops.zeros((rows, columns)) for _ in "kv")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("head_dim", [16, 100])
def test_quantize_heads_rounds_to_half_a_step(head_dim, dtype):
    x = random(3, 5, head_dim) * np.logspace(-3, 3, 5)[:, None]
    x = ops.convert_to_tensor(x.astype("float32"), dtype=dtype)
    integers, scales = quantize_heads(x)
    assert keras.backend.standardize_dtype(integers.dtype) == "int8"
    assert keras.backend.standardize_dtype(scales.dtype) == "float32"
    x = ops.convert_to_numpy(ops.cast(x, "float32"))
    largest = np.abs(x).max(axis=-1, keepdims=True)
    error = np.abs(dequantized(integers, scales) - x)
    assert (error <= largest / 254 * (1 + 1e-5)).all()
    assert (np.abs(ops.convert_to_numpy(integers)).max(axis=-1) == 127).all()


def test_quantize_heads_of_zeros_are_zeros():
    integers, scales = quantize_heads(ops.zeros((2, 8)))
    assert not dequantized(integers, scales).any()


def test_write_to_cache_writes_integers_and_scales_of_the_given_columns():
    cache, end = empty_cache(4, 6, 8), 5
    if keras.config.backend() == "torch":  # See `update_cache`.
        seen = tuple(x[:, :end] for x in cache)
        write_to_cache(seen, *map(ops.convert_to_tensor, (random(4, 2, 8),) * 2), None)
    else:
        key = ops.convert_to_tensor(random(4, 2, 8))
        cache = write_to_cache(cache, key, key, np.int32(3))
    expected = quantize_heads(ops.convert_to_tensor(random(4, 2, 8)))
    for tensors in (cache[::2], cache[1::2]):
        for tensor, update in zip(tensors, expected, strict=True):
            tensor = ops.convert_to_numpy(tensor)
            np.testing.assert_array_equal(tensor[:, 3:5], ops.convert_to_numpy(update))
            assert not tensor[:, :3].any() and not tensor[:, 5:].any()


@pytest.mark.parametrize(("heads", "head_dim"), HEADS)
@pytest.mark.parametrize("length", [1, 5])
@pytest.mark.parametrize("columns", [12, 2 * CACHE_BLOCK])
@pytest.mark.parametrize("at_once", [3, 8])
def test_attend_quantized_equals_attention_over_dequantized_keys_and_values(
    heads, head_dim, length, columns, at_once, monkeypatch
):
    monkeypatch.setattr(quantized_cache, "HEADS_AT_ONCE", at_once)
    batch, end = 2, columns - 3
    rows = batch * heads[1]
    query = ops.convert_to_tensor(3 * random(batch, heads[0], length, head_dim))
    key, value = (random(rows, columns, head_dim, seed=s) for s in (1, 2))
    value[:, end:] = np.nan if keras.config.backend() == "torch" else 0
    fed = end - length + np.arange(length)
    bias = np.where(np.arange(columns)[None] <= fed[:, None], 0, MASKED_SCORE)
    bias = bias[None].repeat(rows, axis=0).astype("float32")
    bias[1, :, 2:7] = MASKED_SCORE  # A gap after a shorter prompt.
    if keras.config.backend() == "torch":
        key, value, bias = key[:, :end], value[:, :end], bias[..., :end]
    bias = ops.convert_to_tensor(bias)
    cache = as_stored((None,) * 4, *map(ops.convert_to_tensor, (key, value)))
    floats = [
        ops.convert_to_tensor(dequantized(*pair)) for pair in (cache[::2], cache[1::2])
    ]
    expected = ops.convert_to_numpy(attend_cached(query, *floats, bias))
    found = ops.convert_to_numpy(attend_quantized(query, cache, bias, end))
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_attend_quantized_in_float16_does_not_overflow():
    # The products of the integers themselves would be 127 * 8 * 100.
    query = ops.full((1, 1, 1, 100), 8.0, "float16")
    key = value = ops.full((1, 4, 100), 0.5, "float16")
    cache = as_stored((None,) * 4, key, value)
    context = attend_quantized(query, cache, ops.zeros((1, 1, 4)), 4)
    assert keras.backend.standardize_dtype(context.dtype) == "float16"
    np.testing.assert_allclose(ops.convert_to_numpy(context), 0.5, rtol=2e-3)


@pytest.mark.skipif(keras.config.backend() != "jax", reason="Tests JAX's devices.")
def test_attend_quantized_converts_blocks_on_a_cpu_only():
    import jax

    shapes = {(2, 2048, 8): "int8", (2, 2048): "float32"}
    cache = [jax.ShapeDtypeStruct(*item) for item in shapes.items() for _ in "kv"]
    query = jax.ShapeDtypeStruct((1, 2, 1, 8), "float32")
    bias = jax.ShapeDtypeStruct((2, 1, 2048), "float32")
    end = jax.ShapeDtypeStruct((), "int32")
    program = jax.jit(attend_quantized).trace(query, cache, bias, end)
    for platform in ("cpu", "cuda", "tpu"):
        text = program.lower(lowering_platforms=(platform,)).as_text()
        in_blocks = f"tensor<2x{CACHE_BLOCK}x8xf32>" in text
        whole = "tensor<2x2048x8xf32>" in text
        assert (in_blocks, whole) == (platform == "cpu", platform != "cpu")
