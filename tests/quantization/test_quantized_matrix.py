"""A quantized matrix is `(values - zeros) * scales`, packed as its docstring says."""

import numpy as np
import pytest

from keras_openllama.quantization.quantized_matrix import (
    QuantizedMatrix,
    pack_nibbles,
    unpack_nibbles,
)

pytestmark = pytest.mark.backend_free


def scales(*rows):
    return np.array(rows, "float16")


def test_dequantize_multiplies_values_of_8_bits_by_the_scale_of_their_group():
    values = np.array([[1, -2, 3], [4, 5, -127]], "int8")
    matrix = QuantizedMatrix(8, 2, 3, values, scales([0.5, 2], [1, 0.25]))
    assert matrix.dequantize().tolist() == [[0.5, -1, 6], [4, 5, -31.75]]
    assert (matrix.shape, matrix.groups, matrix.nbytes) == ((2, 3), 2, 6 + 8)


def test_dequantize_subtracts_8_from_the_nibbles_of_a_symmetric_matrix():
    matrix = QuantizedMatrix(4, 4, 4, np.array([[0x80, 0xF9]], "uint8"), scales([2]))
    assert matrix.dequantize().tolist() == [[-16, 0, 2, 14]]
    assert matrix.integers().tolist() == [[-8, 0, 1, 7]]


def test_dequantize_subtracts_the_zero_point_of_the_group():
    zeros = np.array([[0, 15]], "uint8")
    values = np.array([[0xF0, 0xF0]], "uint8")
    matrix = QuantizedMatrix(4, 2, 4, values, scales([1, 0.5]), zeros)
    assert matrix.dequantize().tolist() == [[0, 15, -7.5, 0]]


def test_dequantize_rounds_once_to_another_dtype():
    values = np.array([[127]], "int8")
    matrix = QuantizedMatrix(8, 1, 1, values, scales([1.001]))
    expected = matrix.dequantize().astype("float16")
    assert matrix.dequantize("float16") == expected


def test_dequantize_in_blocks_gives_the_same_weights(monkeypatch):
    generator = np.random.default_rng(0)
    values = generator.integers(-127, 128, (50, 6)).astype("int8")
    matrix = QuantizedMatrix(8, 6, 6, values, np.ones((50, 1), "float16"))
    monkeypatch.setattr("keras_openllama.quantization.quantized_matrix._BLOCK", 18)
    assert (matrix.dequantize() == values).all()


def test_rows_are_views():
    values = np.arange(6, dtype="uint8").reshape(3, 2)
    matrix = QuantizedMatrix(4, 4, 4, values, scales([1], [2], [3]))
    rows = matrix.rows(1, 3)
    assert rows.shape == (2, 4) and np.shares_memory(rows.values, values)
    assert (rows.dequantize() == matrix.dequantize()[1:]).all()


@pytest.mark.parametrize("inputs", [1, 2, 7, 8])
def test_unpack_nibbles_inverts_pack_nibbles(inputs):
    nibbles = np.random.default_rng(0).integers(0, 16, (3, inputs)).astype("uint8")
    packed = pack_nibbles(nibbles)
    assert packed.shape == (3, (inputs + 1) // 2)
    assert (unpack_nibbles(packed, inputs) == nibbles).all()


def test_pack_nibbles_has_the_layout_of_matmul_nbits():
    nibbles = np.arange(16, dtype="uint8")[None]
    assert pack_nibbles(nibbles)[0, :2].tolist() == [0x10, 0x32]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 5}, "`bits` must be 8 or 4. Received: bits=5"),
        ({"group_size": 0}, "`group_size` must be a positive integer"),
        (
            {"values": np.zeros((2, 4), "int8")},
            r"`values` must be a uint8 array of .*2",
        ),
        ({"scales": np.ones((2, 2), "float32")}, "`scales` must be a float16 array"),
        (
            {"scales": np.ones((2, 3), "float16")},
            r"shape \(2, 2\) for bits=4, inputs=4",
        ),
        ({"zeros": np.ones((2, 2), "int8")}, "`zeros` must be a uint8 array"),
        ({"bits": 8, "zeros": np.ones((2, 2), "uint8")}, "8 bits have no zero points"),
    ],
)
def test_quantized_matrix_rejects_other_shapes_and_dtypes(change, message):
    arguments = {
        "bits": 4,
        "group_size": 2,
        "inputs": 4,
        "values": np.zeros((2, 2), "uint8"),
        "scales": np.ones((2, 2), "float16"),
    }
    QuantizedMatrix(**arguments)
    with pytest.raises(ValueError, match=message):
        QuantizedMatrix(**{**arguments, **change})
