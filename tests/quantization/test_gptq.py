"""GPTQ changes the products with a matrix less than rounding does."""

import numpy as np
import pytest

from keras_openllama.quantization import quantize_matrix
from keras_openllama.quantization.gptq import round_with_hessian
from keras_openllama.quantization.policies import MatrixFormat

pytestmark = pytest.mark.backend_free

FORMATS = [
    MatrixFormat(4, 32),
    MatrixFormat(4, 32, symmetric=False),
    MatrixFormat(4, None),
    MatrixFormat(8, None),
    MatrixFormat(8, 32),
]


def correlated_inputs(tokens=400, inputs=200, seed=0):
    """Activations of which a few have large magnitudes, as in a language model."""
    random = np.random.default_rng(seed)
    mixed = random.normal(size=(tokens, 20)) @ random.normal(size=(20, inputs))
    magnitudes = np.exp(random.normal(size=inputs))
    return (mixed + 0.3 * random.normal(size=(tokens, inputs))) * magnitudes


def random_weights(outputs=40, inputs=200, seed=1):
    return np.random.default_rng(seed).normal(size=(outputs, inputs)).astype("float32")


def output_error(x, weights, matrix):
    return np.square(x @ (matrix.dequantize() - weights).T).sum()


def rounded(weights, format):
    group_size = format.group_size_of(weights.shape[1])
    return quantize_matrix(weights, format.bits, group_size, format.symmetric)


def assert_same(found, expected):
    for name in ("values", "scales", "zeros"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))


@pytest.mark.parametrize("activation_order", [False, True])
@pytest.mark.parametrize("format", FORMATS)
def test_round_with_hessian_has_a_third_of_the_output_error_of_rounding(
    format, activation_order
):
    x, weights = correlated_inputs(), random_weights()
    found = round_with_hessian(
        weights, x.T @ x, format, activation_order=activation_order
    )
    expected = output_error(x, weights, rounded(weights, format))
    assert output_error(x, weights, found) < expected / 3


@pytest.mark.parametrize("activation_order", [False, True])
@pytest.mark.parametrize("format", FORMATS)
def test_round_with_hessian_rounds_as_usual_for_a_multiple_of_the_identity(
    format, activation_order
):
    weights = random_weights(inputs=100)  # The last group of 32 is shorter.
    found = round_with_hessian(
        weights, 7 * np.eye(100), format, activation_order=activation_order
    )
    assert_same(found, rounded(weights, format))


def test_round_with_hessian_solves_the_conditional_least_squares_of_the_paper():
    # After each input, the paper changes the remaining weights to the best for the
    # rounded ones, by the inverse of the Hessian of the remaining inputs.
    x, weights = correlated_inputs(inputs=24), random_weights(inputs=24)
    format = MatrixFormat(8, None)
    found = round_with_hessian(weights, x.T @ x, format, damping=0.01)
    hessian = x.T @ x
    hessian += 0.01 * np.diagonal(hessian).mean() * np.eye(24)
    scales = rounded(weights, format).scales.astype("float64")
    remaining = weights.astype("float64")
    expected = np.empty_like(found.values)
    for i in range(24):
        expected[:, i] = np.clip(np.rint(remaining[:, i] / scales[:, 0]), -127, 127)
        error = expected[:, i] * scales[:, 0] - remaining[:, i]
        rest = hessian[i + 1 :, i + 1 :]
        if len(rest):
            change = np.linalg.solve(rest, hessian[i + 1 :, i])
            remaining[:, i + 1 :] -= error[:, None] * change
    np.testing.assert_array_equal(found.values, expected)


def test_round_with_hessian_gives_many_outputs_what_each_gets_alone():
    x, weights = correlated_inputs(inputs=64), random_weights(1100, 64)
    format = MatrixFormat(4, 32)
    found = round_with_hessian(weights, x.T @ x, format)
    alone = round_with_hessian(weights[1050:1060], x.T @ x, format)
    assert_same(found.rows(1050, 1060), alone)


@pytest.mark.parametrize("activation_order", [False, True])
def test_round_with_hessian_rounds_inputs_without_activations_as_usual(
    activation_order,
):
    x, weights = correlated_inputs(inputs=64), random_weights(inputs=64)
    x[:, 32:] = 0
    format = MatrixFormat(4, 32)
    found = round_with_hessian(
        weights, x.T @ x, format, activation_order=activation_order
    )
    expected = rounded(weights, format)
    np.testing.assert_array_equal(found.values[:, 16:], expected.values[:, 16:])
    assert output_error(x, weights, found) < output_error(x, weights, expected)


def test_round_with_hessian_rejects_what_it_cannot_use():
    weights = random_weights(inputs=4)
    x = correlated_inputs(tokens=2, inputs=4)
    with pytest.raises(ValueError, match=r"`hessian_damping` must be larger.*=0"):
        round_with_hessian(weights, -np.ones((4, 4)), FORMATS[0], damping=0)
    with pytest.raises(ValueError, match="not finite"):
        round_with_hessian(weights, np.inf * (x.T @ x), FORMATS[0])
