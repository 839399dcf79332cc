"""Matrices are rounded to the nearest values of 8 or 4 bits."""

import ml_dtypes
import numpy as np
import pytest

from keras_openllama.quantization.rounding import quantize_matrix

pytestmark = pytest.mark.backend_free


@pytest.fixture
def weights():
    return np.random.default_rng(0).normal(0, 0.02, (48, 80)).astype("float32")


def error(weights, matrix):
    return np.sqrt(np.mean((matrix.dequantize() - weights) ** 2)) / weights.std()


def test_quantize_matrix_to_8_bits_is_within_half_a_step(weights):
    matrix = quantize_matrix(weights, bits=8)
    steps = matrix.scales.astype("float32")
    assert matrix.scales.shape == (48, 1)
    assert (abs(matrix.dequantize() - weights) <= 0.502 * steps).all()


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("symmetric", [True, False])
def test_quantize_matrix_to_4_bits_is_within_the_error_of_4_bits(
    weights, group_size, symmetric
):
    matrix = quantize_matrix(weights, 4, group_size, symmetric)
    assert matrix.values.shape == (48, 40)
    assert matrix.group_size == min(group_size, 80)  # The last group is shorter.
    assert error(weights, matrix) < 0.13


def test_quantize_matrix_with_smaller_groups_has_smaller_errors(weights):
    errors = [error(weights, quantize_matrix(weights, 4, size)) for size in (16, 80)]
    assert errors[0] < 0.85 * errors[1]


def test_quantize_matrix_to_4_bits_searches_the_scale_of_a_group(weights):
    """Its squared error is less than with the largest weight at -8, as in Q4_0."""
    groups = weights.reshape(-1, 16)
    rows = np.arange(len(groups))
    extreme = groups[rows, abs(groups).argmax(axis=1)]
    scales = (extreme / -8).astype("float16").astype("float32")[:, None]
    rounded = np.clip(np.rint(groups / scales), -8, 7) * scales
    expected = np.sqrt(np.mean((rounded - groups) ** 2)) / weights.std()
    assert error(weights, quantize_matrix(weights, 4, 16)) < 0.97 * expected


def test_quantize_matrix_keeps_zeros_exactly(weights):
    weights[3] = 0
    weights[5, 7] = 0
    for bits, symmetric in ((8, True), (4, True), (4, False)):
        result = quantize_matrix(weights, bits, 32, symmetric).dequantize()
        assert not result[3].any() and result[5, 7] == 0


def test_quantize_matrix_with_zero_points_covers_weights_of_one_sign():
    weights = np.linspace(0, 1.5, 16, dtype="float32")[None]
    np.testing.assert_allclose(
        quantize_matrix(weights, 4, symmetric=False).dequantize(), weights, rtol=1e-3
    )


def test_quantize_matrix_of_quantized_weights_is_exact(weights):
    once = quantize_matrix(weights, 8, 16)
    twice = quantize_matrix(once.dequantize(), 8, 16)
    assert (twice.values == once.values).all() and (twice.scales == once.scales).all()


def test_quantize_matrix_does_not_depend_on_the_blocks(weights, monkeypatch):
    whole = quantize_matrix(weights, 4, 16)
    monkeypatch.setattr("keras_openllama.quantization.rounding._BLOCK", 100)
    in_blocks = quantize_matrix(weights, 4, 16)
    assert (whole.values == in_blocks.values).all()
    assert (whole.scales == in_blocks.scales).all()


def test_quantize_matrix_does_not_depend_on_the_order_in_memory():
    # A sum in another order changes few of these scales, whose float16 differs.
    weights = np.random.default_rng(1).normal(0, 0.1, (4096, 256)).astype("float32")
    expected = quantize_matrix(weights, 4, 32)
    found = quantize_matrix(np.asfortranarray(weights), 4, 32)
    assert (found.values == expected.values).all()
    assert (found.scales == expected.scales).all()


@pytest.mark.parametrize("dtype", ["float64", "float16", ml_dtypes.bfloat16])
def test_quantize_matrix_accepts_other_dtypes(weights, dtype):
    rounded = weights.astype(dtype)
    expected = quantize_matrix(rounded.astype("float32"), 4, 16)
    assert (quantize_matrix(rounded, 4, 16).values == expected.values).all()


def test_quantize_matrix_of_tiny_weights_has_scale_zero():
    matrix = quantize_matrix(np.full((1, 4), 1e-9, "float32"), bits=8)
    assert not matrix.scales.any() and not matrix.dequantize().any()


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (
            np.ones(3, "float32"),
            r"must be a matrix. Received: an array of shape \(3,\)",
        ),
        (np.array([[np.nan, 1]], "float32"), "must be finite"),
        (np.array([[np.inf, 1]], "float32"), "must be finite"),
        (np.array([[1e7, 1]], "float32"), "Received: a weight of 1e[+]07"),
    ],
)
def test_quantize_matrix_rejects_weights_without_scales(weights, message):
    with pytest.raises(ValueError, match=message):
        quantize_matrix(weights, bits=8)
