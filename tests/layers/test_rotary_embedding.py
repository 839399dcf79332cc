"""Rotary embedding: its properties, layout and scaling."""

import importlib.util

import keras
import numpy as np
import pytest
import torch
from keras import ops
from transformers import LlamaConfig
from transformers.models.llama import modeling_llama

from keras_openllama.layers import RotaryEmbedding
from keras_openllama.layers.rotary_embedding import (
    _rotate,
    _rotate_by_product,
    rotate,
)


def as_numpy(pair):
    return tuple(ops.convert_to_numpy(t) for t in pair)


def vectors(heads, length, head_dim):
    x = np.random.default_rng(0).normal(size=(1, heads, length, head_dim))
    return x.astype("float32")


@pytest.mark.parametrize("head_dim", [16, 100, 128])
def test_rotate_equals_transformers(head_dim):
    x = vectors(2, 40, head_dim)
    positions = np.arange(40)[None]
    cos, sin = RotaryEmbedding(head_dim)(positions)
    config = LlamaConfig(hidden_size=4 * head_dim, num_attention_heads=4)
    reference = modeling_llama.LlamaRotaryEmbedding(config)
    tensor = torch.tensor(x)
    expected, _ = modeling_llama.apply_rotary_pos_emb(
        tensor, tensor, *reference(tensor, torch.tensor(positions))
    )
    np.testing.assert_allclose(
        ops.convert_to_numpy(rotate(x, cos, sin)), expected.numpy(), atol=1e-5
    )


@pytest.mark.skipif(keras.config.backend() != "jax", reason="Needs JAX.")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rotate_by_product_is_bitwise_equal_to_rotate(dtype):
    x = ops.cast(vectors(2, 40, 100), dtype)
    cos, sin = RotaryEmbedding(100)(np.arange(40)[None])
    # Not compiled: XLA may fuse a product and a sum, which rounds once.
    plain, by_product = _rotate(x, cos, sin), _rotate_by_product(x, cos, sin)
    assert by_product.dtype == plain.dtype
    np.testing.assert_array_equal(plain, by_product)


@pytest.mark.backend_free
@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="Needs the TPU compiler."
)
def test_rotate_by_product_is_faster_on_a_tpu():
    """By the compiler's estimate, after the query projection of 8,192 tokens of 7B."""
    import jax

    from keras_openllama.planning.aot_compile import topology_devices
    from keras_openllama.planning.cost_model import estimate_cost

    chip, devices = topology_devices("v4:2x2x1")
    on_chip = jax.sharding.SingleDeviceSharding(devices[0])

    def shape(*sizes, dtype="bfloat16"):
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=on_chip)

    def milliseconds(rotation):
        def queries(x, kernel, cos, sin):
            x = jax.numpy.matmul(x, kernel.T).reshape(4, 2048, 32, 128)
            return rotation(x.transpose(0, 2, 1, 3), cos, sin)

        table = shape(1, 1, 2048, 64, dtype="float32")
        arguments = shape(4, 2048, 4096), shape(4096, 4096), table, table
        program = jax.jit(queries).lower(*arguments).compile()
        return 1000 * estimate_cost(program.as_text(), chip).compute_seconds

    by_halves, by_product = milliseconds(_rotate), milliseconds(_rotate_by_product)
    print(f"{by_halves:.2f} ms by halves, {by_product:.2f} ms by a product")
    assert by_product < 0.7 * by_halves


@pytest.mark.skipif(keras.config.backend() != "jax", reason="Needs JAX.")
def test_rotary_embedding_computes_the_tables_once_on_a_cpu():
    import jax

    embedding = RotaryEmbedding(100)

    def rotated(positions, *tensors):
        tables = embedding(positions)
        return [rotate(x, *tables) for x in tensors]

    arguments = np.arange(64)[None], vectors(1, 64, 100), vectors(1, 64, 100)
    program = jax.jit(rotated).lower(*arguments).compile().as_text()
    assert program.count(" sine(") == program.count(" cosine(") == 1


def test_rotate_preserves_norms():
    x = vectors(1, 64, 100)
    rotated = ops.convert_to_numpy(
        rotate(x, *RotaryEmbedding(100)(np.arange(64)[None]))
    )
    np.testing.assert_allclose(
        np.linalg.norm(rotated, axis=-1), np.linalg.norm(x, axis=-1), rtol=1e-5
    )


def test_rotated_dot_products_depend_on_distance_only():
    rope = RotaryEmbedding(100)
    query, key = vectors(1, 1, 100), vectors(1, 1, 100)[..., ::-1].copy()

    def product(query_at, key_at):
        q = rotate(query, *rope(np.array([[query_at]])))
        k = rotate(key, *rope(np.array([[key_at]])))
        return float(ops.sum(q * k))

    assert product(7, 3) == pytest.approx(product(107, 103), abs=1e-3)
    assert abs(product(7, 3) - product(7, 4)) > 1e-2


def test_linear_rope_scaling_divides_positions():
    scaled = RotaryEmbedding(16, scaling={"rope_type": "linear", "factor": 4})
    plain = RotaryEmbedding(16)
    for a, b in zip(
        as_numpy(scaled(np.array([[0, 4, 40]]))),
        as_numpy(plain(np.array([[0, 1, 10]]))),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_dynamic_rope_scaling_applies_to_long_sequences_only():
    rope = RotaryEmbedding(
        16, scaling={"rope_type": "dynamic", "factor": 2.0}, max_sequence_length=8
    )
    positions = np.arange(6)[None]
    cos, _ = as_numpy(rope(positions, np.array([6, 8, 24])))
    plain, _ = as_numpy(RotaryEmbedding(16)(positions))
    np.testing.assert_allclose(cos[0], plain[0], atol=1e-6)
    np.testing.assert_allclose(cos[1], plain[0], atol=1e-6)
    # The formula of transformers for a sequence of 24 over a context of 8.
    base = 10000.0 * (2.0 * 24 / 8 - 1.0) ** (16 / 14)
    angles = positions[0][:, None] / base ** (np.arange(0, 16, 2) / 16)
    np.testing.assert_allclose(cos[2, 0], np.cos(angles), atol=1e-6)


def test_dynamic_rope_scaling_needs_final_lengths():
    rope = RotaryEmbedding(16, scaling={"rope_type": "dynamic", "factor": 2.0})
    with pytest.raises(ValueError, match="final_lengths"):
        rope(np.arange(4)[None])


@pytest.mark.parametrize(
    "scaling",
    [{"rope_type": "yarn", "factor": 2.0}, {"factor": 2.0}, {"rope_type": "linear"}]
    + [{"rope_type": "linear", "factor": f} for f in (0.5, "2", None)]
    + [{"rope_type": "linear", "factor": 2.0, "beta": 1}],
    ids=str,
)
def test_rotary_embedding_rejects_unsupported_scaling(scaling):
    with pytest.raises(ValueError, match="rope_scaling"):
        RotaryEmbedding(16, scaling=scaling)


def test_rotary_embedding_rejects_an_odd_head_dim():
    with pytest.raises(ValueError, match="head_dim=15"):
        RotaryEmbedding(15)
