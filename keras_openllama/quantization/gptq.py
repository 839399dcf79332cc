"""GPTQ: rounds a matrix of weights so that its products change as little as possible.

With inputs `X` of a calibration and the error `E` of the weights, the squared error of
the products is `trace(E @ H @ E.T)`, where `H = X.T @ X`; GPTQ calls `2 * H` the
Hessian. With a Cholesky factorization `H = V @ V.T`, `V` upper triangular, this is the
squared norm of `E @ V`, whose column `j` depends on the errors of inputs up to `j`. So
inputs are rounded one after the other, each weight to the value that brings its column
of `E @ V` nearest to zero, given the errors before.

Source: GPTQ (arXiv:2210.17323), whose update of the remaining weights by the inverse
Hessian gives these values, too.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses

import numpy as np

from keras_openllama.quantization.policies import MatrixFormat
from keras_openllama.quantization.quantized_matrix import (
    QuantizedMatrix,
    expand_groups,
    pack_nibbles,
)
from keras_openllama.quantization.rounding import (
    choose_scales,
    count_cores,
    group_inputs,
    inverse_scales,
    round_to_scales,
)

# Heuristics for speed: outputs that a thread rounds together, inputs that get the
# errors of those before in one product, and in the loop over single inputs.
_OUTPUTS = 1024
_INPUTS = 128
_LOOP = 16


def round_with_hessian(
    weights: np.ndarray,
    hessian: np.ndarray,
    format: MatrixFormat,
    *,
    damping: float = 0.01,
    activation_order: bool = False,
) -> QuantizedMatrix:
    """Rounds a matrix of weights by GPTQ.

    The scales of a group of inputs are chosen when it is reached, for its weights with
    the feedback of the errors before; with `activation_order` all are chosen before.
    For a multiple of the identity as Hessian the result is that of `quantize_matrix`.

    Args:
        weights: Array `(outputs, inputs)` of a floating-point dtype.
        hessian: `X.T @ X` of inputs `X`, or a multiple, `(inputs, inputs)`.
        format: How to quantize the matrix.
        damping: Added to the diagonal of the Hessian, as a fraction of its mean.
        activation_order: Whether to round the inputs by their magnitudes, the largest
            first, instead of in their order.

    Returns:
        The quantized matrix.

    Raises:
        ValueError: If the Hessian is not finite, or singular with its damping.

    Example:
        >>> from keras_openllama.quantization import quantize_matrix
        >>> random = np.random.default_rng(0)
        >>> x = random.normal(size=(64, 8)) @ random.normal(size=(8, 8))
        >>> weights = random.normal(size=(4, 8))
        >>> def error(matrix):
        ...     return np.square(x @ (matrix.dequantize() - weights).T).sum()
        >>> gptq = round_with_hessian(weights, x.T @ x, MatrixFormat(4, group_size=4))
        >>> bool(error(gptq) < error(quantize_matrix(weights, 4, group_size=4)))
        True
    """
    inputs = weights.shape[1]
    order = None
    if activation_order:
        order = np.argsort(-np.diagonal(hessian), kind="stable")
    feedback = _feedback(hessian, damping, slice(None) if order is None else order)
    group_size = format.group_size_of(inputs)

    def round_outputs(start):
        outputs = np.ascontiguousarray(weights[start : start + _OUTPUTS], "float32")
        return _round_outputs(outputs, feedback, order, format, group_size)

    with concurrent.futures.ThreadPoolExecutor(count_cores()) as executor:
        parts = list(executor.map(round_outputs, range(0, len(weights), _OUTPUTS)))
    integers, scales, zeros = map(np.concatenate, zip(*parts, strict=True))
    if format.bits == 8:
        values = integers.astype("int8")
    else:
        values = pack_nibbles(integers.astype("uint8"))
    zeros = None if format.symmetric else zeros.astype("uint8")
    scales = scales.astype("float16")
    return QuantizedMatrix(format.bits, group_size, inputs, values, scales, zeros)


def _feedback(hessian, damping, order):
    """Returns `V` divided by its diagonal, float32, with the inputs in an order."""
    hessian = hessian[order][:, order].astype("float64")
    diagonal = np.einsum("ii->i", hessian)  # A view.
    if not np.isfinite(diagonal).all():
        raise ValueError(
            "The activations of the calibration are not finite. Use a model in float32 "
            "or bfloat16, or other texts."
        )
    diagonal[diagonal == 0] = 1  # Inputs without activations are rounded as usual.
    diagonal += damping * diagonal.mean()
    try:
        factor = np.linalg.cholesky(hessian[::-1, ::-1])[::-1, ::-1]
    except np.linalg.LinAlgError as error:
        raise ValueError(
            "`hessian_damping` must be larger, or there must be more texts: the "
            f"Hessian is singular. Received: hessian_damping={damping}"
        ) from error
    return (factor / np.diagonal(factor)).astype("float32")


@dataclasses.dataclass
class _Inputs:
    """What belongs to some inputs, float32 arrays `(inputs, outputs)`.

    Attributes:
        weights: The weights.
        targets: The weights with the feedback of the errors of other inputs.
        scales: Scales of their groups.
        zeros: Integers that stand for zero.
        integers: The targets after rounding.
        errors: The weights less their rounded values.
    """

    weights: np.ndarray
    targets: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray
    integers: np.ndarray
    errors: np.ndarray

    def part(self, rows):
        return _Inputs(*(array[rows] for array in vars(self).values()))


def _round_outputs(weights, feedback, order, format, group_size):
    """Returns integers, and scales and zeros of the groups, of some outputs."""
    every = _Inputs(
        np.ascontiguousarray(weights.T), *np.empty((5, *weights.T.shape), "f")
    )
    if order is not None:
        groups = group_inputs(weights, group_size)
        found = choose_scales(groups, format.bits, format.symmetric)
        arrays = (expand_groups(x, group_size, len(order)) for x in found)
        every.scales[...], every.zeros[...] = (x.T for x in arrays)
        every = every.part(order)
    step = group_size if order is None else _INPUTS
    for start in range(0, len(every.weights), step):
        rows = slice(start, start + step)
        part = every.part(rows)
        feedback_before = feedback[:start, rows].T @ every.errors[:start]
        np.add(part.weights, feedback_before, out=part.targets)
        if order is None:
            group = np.ascontiguousarray(part.targets.T)
            found = choose_scales(group, format.bits, format.symmetric)
            part.scales[...], part.zeros[...] = found
        _round_inputs(part, feedback[rows, rows], format.bits)
    if order is not None:
        every = every.part(np.argsort(order))
    first = slice(None, None, group_size)
    return every.integers.T, every.scales[first].T, every.zeros[first].T


def _round_inputs(part, feedback, bits):
    """Rounds inputs one after the other; writes their integers and errors."""
    size = len(part.weights)
    if size > _LOOP:
        left, right = slice(0, size // 2), slice(size // 2, size)
        before, after = part.part(left), part.part(right)
        _round_inputs(before, feedback[left, left], bits)
        after.targets += feedback[left, right].T @ before.errors
        _round_inputs(after, feedback[right, right], bits)
        return
    inverse = inverse_scales(part.scales)
    for i in range(size):
        integers = round_to_scales(part.targets[i], inverse[i], part.zeros[i], bits)
        part.integers[i] = integers
        part.errors[i] = part.weights[i] - (integers - part.zeros[i]) * part.scales[i]
        part.targets[i + 1 :] += feedback[i, i + 1 :, None] * part.errors[i]
