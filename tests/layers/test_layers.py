"""What all layers share: configs, dtypes and simple formulas."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_openllama import layers

LAYERS = {
    "rotary": lambda: layers.RotaryEmbedding(
        100,
        max_wavelength=5e5,
        scaling={"rope_type": "linear", "factor": 2.0},
        max_sequence_length=64,
    ),
    "norm": lambda: layers.RMSNorm(epsilon=1e-3, dtype="mixed_bfloat16"),
    "attention": lambda: layers.CausalSelfAttention(
        4, 2, 100, initializer_std=0.5, dtype="bfloat16"
    ),
    "feed-forward": lambda: layers.FeedForward(48, initializer_std=0.5),
    "decoder": lambda: layers.DecoderLayer(
        4, 2, 100, 48, layer_norm_epsilon=1e-3, initializer_std=0.5, name="one"
    ),
}


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_layers_are_restored_from_their_config(make):
    layer = make()
    config = keras.saving.serialize_keras_object(layer)
    restored = keras.saving.deserialize_keras_object(config)
    assert type(restored) is type(layer)
    assert restored.get_config() == layer.get_config()
    assert keras.saving.serialize_keras_object(restored) == config


def test_rms_norm_divides_by_the_root_mean_square():
    x = np.random.default_rng(0).normal(size=(2, 3, 8)).astype("float32")
    layer = layers.RMSNorm(epsilon=1e-6)
    layer.build(x.shape)
    layer.scale.assign(np.arange(8.0))
    expected = x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-6) * np.arange(8.0)
    np.testing.assert_allclose(ops.convert_to_numpy(layer(x)), expected, rtol=1e-5)


@pytest.mark.parametrize("policy", ["bfloat16", "mixed_bfloat16"])
def test_rms_norm_computes_in_float32(policy):
    layer = layers.RMSNorm(dtype=policy)
    # Sums in bfloat16 would be inaccurate, and float16 would overflow.
    x = ops.cast(np.full((1, 4096), 300.0, "float32"), "bfloat16")
    y = layer(x)
    assert keras.backend.standardize_dtype(y.dtype) == "bfloat16"
    np.testing.assert_array_equal(ops.convert_to_numpy(ops.cast(y, "float32")), 1.0)


def test_rms_norm_scale_stays_float32_under_a_mixed_policy():
    layer = layers.RMSNorm(dtype="mixed_bfloat16")
    layer.build((1, 2))
    layer.scale.assign([1.005, 1.0])  # bfloat16 rounds 1.005 to 1 or 1.0078.
    x = ops.cast([[201.0, 200.0]], "float32")
    y = ops.convert_to_numpy(ops.cast(layer(x), "float32"))
    assert y[0, 0] > y[0, 1]


def test_feed_forward_is_swiglu():
    layer = layers.FeedForward(12)
    x = np.random.default_rng(0).normal(size=(2, 3, 8)).astype("float32")
    y = ops.convert_to_numpy(layer(x))
    gate, up, down = (
        ops.convert_to_numpy(m.kernel).T for m in (layer.gate, layer.up, layer.down)
    )
    gated = x @ gate
    expected = (gated / (1 + np.exp(-gated)) * (x @ up)) @ down
    np.testing.assert_allclose(y, expected, atol=1e-6)
