"""Rounds a matrix of weights to 8 or 4 bits."""

from __future__ import annotations

import concurrent.futures
import os

import numpy as np

from keras_openllama.quantization.quantized_matrix import (
    NIBBLE_ZERO,
    QuantizedMatrix,
    check_format,
    count_groups,
    pack_nibbles,
    stored_columns,
)

# Rows are rounded in blocks of about this many weights, which stay in a core's cache.
_BLOCK = 1 << 16
_FLOAT16_MAX = 65504.0
# Integers that the weight of the largest magnitude of a group may become, before they
# are clipped to those from -8 to 7.
# Heuristic: more candidates hardly lower the perplexity (`benchmarks/quantization.py`).
_EXTREMES = (-8, -7.4, -8.6, 7.2)


def quantize_matrix(
    weights: np.ndarray,
    bits: int,
    group_size: int | None = None,
    symmetric: bool = True,
) -> QuantizedMatrix:
    """Rounds a matrix of weights to 8 or 4 bits.

    Each group is rounded to the nearest values of its scale, which is rounded to
    float16 before. For symmetric groups of 4 bits, the scale is the best of a few by
    the squared error.

    Args:
        weights: Array `(outputs, inputs)` of a floating-point dtype.
        bits: 8 or 4.
        group_size: Number of inputs that share a scale. `None` stands for all inputs
            of an output.
        symmetric: Whether to have no zero points, as always with 8 bits.

    Returns:
        The quantized matrix.

    Raises:
        ValueError: If `weights` is not a matrix of finite numbers that float16 scales
            can represent, or there is no such format (see `check_format`).

    Example:
        >>> weights = np.array([[0.5, -4, 3, 2]], "float32")
        >>> quantize_matrix(weights, bits=4).dequantize().tolist()
        [[0.5, -4.0, 3.0, 2.0]]
    """
    if weights.ndim != 2:
        raise ValueError(
            f"`weights` must be a matrix. Received: an array of shape {weights.shape}"
        )
    outputs, inputs = weights.shape
    group_size = inputs if group_size is None else min(group_size, inputs)
    check_format(bits, group_size, symmetric)
    groups = count_groups(inputs, group_size)
    values = np.empty(
        (outputs, stored_columns(bits, inputs)), "int8" if bits == 8 else "uint8"
    )
    scales = np.empty((outputs, groups), "float16")
    zeros = None if symmetric else np.empty((outputs, groups), "uint8")
    matrix = QuantizedMatrix(bits, group_size, inputs, values, scales, zeros)
    step = max(1, _BLOCK // inputs)

    def quantize_rows(start):
        rows = slice(start, start + step)
        _quantize_block(weights[rows], matrix.rows(start, start + step))

    with concurrent.futures.ThreadPoolExecutor(count_cores()) as executor:
        # NumPy releases the interpreter's lock. `list` raises what a thread raised.
        list(executor.map(quantize_rows, range(0, outputs, step)))
    return matrix


def count_cores() -> int:
    """Returns the number of cores that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # Not on Linux.
        return os.cpu_count() or 1


def _quantize_block(weights, target):
    """Writes the rounded weights into the arrays of `target`."""
    # Sums depend on the order in memory, and some sources are transposed.
    grouped = group_inputs(np.ascontiguousarray(weights, "float32"), target.group_size)
    symmetric = target.zeros is None
    target.scales[...], zeros = choose_scales(grouped, target.bits, symmetric)
    if not symmetric:
        target.zeros[...] = zeros
    integers = round_to_scales(
        grouped, inverse_scales(target.scales)[..., None], zeros[..., None], target.bits
    )
    integers = integers.reshape(len(weights), -1)[:, : target.inputs]
    if target.bits == 8:
        target.values[...] = integers
    else:
        target.values[...] = pack_nibbles(integers.astype("uint8"))


def group_inputs(weights: np.ndarray, group_size: int) -> np.ndarray:
    """Reshapes to `(outputs, groups, group size)`, with zeros in the last group.

    Example:
        >>> group_inputs(np.ones((2, 3)), group_size=2).shape
        (2, 2, 2)
    """
    outputs, inputs = weights.shape
    missing = -inputs % group_size
    if missing:
        weights = np.pad(weights, ((0, 0), (0, missing)))
    return weights.reshape(outputs, -1, group_size)


def choose_scales(
    weights: np.ndarray, bits: int, symmetric: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Chooses the scales of groups of weights.

    Args:
        weights: float32 array `(..., group size)`.
        bits: 8 or 4.
        symmetric: Whether to have no zero points.

    Returns:
        The scales, float16 `(...)`, and the integers that stand for zero, float32 of
        that shape: 0 for 8 bits, 8 for symmetric groups of 4 bits.

    Raises:
        ValueError: If weights are not finite, or too large for float16 scales.

    Example:
        >>> scales, zeros = choose_scales(np.array([[-8, 2]], "float32"), 4, True)
        >>> scales.tolist(), zeros.tolist()
        ([1.0], [8.0])
    """
    low, high = weights.min(axis=-1), weights.max(axis=-1)
    _check_range(low, high, bits)
    if bits == 8:
        return (np.maximum(-low, high) / 127).astype("float16"), np.zeros_like(low)
    if symmetric:
        # The weight of the largest magnitude becomes about -8: scales may be negative.
        extreme = np.where(-low >= high, low, high)
        scales = _search_scales(weights, extreme).astype("float16")
        return scales, np.full_like(low, NIBBLE_ZERO)
    low, high = np.minimum(low, 0), np.maximum(high, 0)
    scales = ((high - low) / 15).astype("float16")
    return scales, np.clip(np.rint(-low * inverse_scales(scales)), 0, 15)


def round_to_scales(
    weights: np.ndarray, inverse: np.ndarray, zeros: np.ndarray, bits: int
) -> np.ndarray:
    """Rounds weights to the nearest values of given scales.

    Args:
        weights: float32 array.
        inverse: `inverse_scales` of the scales, broadcastable to `weights`.
        zeros: What `choose_scales` returns with the scales, likewise.
        bits: 8 or 4.

    Returns:
        Integers as float32, from -127 to 127 for 8 bits, and from 0 to 15 for 4 bits.

    Example:
        >>> weights, ones = np.array([[-8, 2.4]], "float32"), np.ones(1, "float32")
        >>> round_to_scales(weights, inverse=ones, zeros=8 * ones, bits=4).tolist()
        [[0.0, 10.0]]
    """
    with np.errstate(invalid="ignore"):
        integers = np.rint(weights * inverse)
    integers += zeros
    smallest, largest = (-127, 127) if bits == 8 else (0, 15)
    return np.clip(integers, smallest, largest, out=integers)


def inverse_scales(scales: np.ndarray) -> np.ndarray:
    """Returns `1 / scales` in float32, and 0 where a scale is 0.

    Example:
        >>> inverse_scales(np.array([0, 0.5], "float16")).tolist()
        [0.0, 2.0]
    """
    scales = scales.astype("float32")
    with np.errstate(divide="ignore", over="ignore"):
        return np.where(scales == 0, np.float32(0), np.float32(1) / scales)


def _check_range(low, high, bits):
    largest = np.maximum(-low, high).max(initial=0)
    if not np.isfinite(largest):
        raise ValueError("`weights` must be finite. Received: infinities or NaN")
    if largest > _FLOAT16_MAX * (127 if bits == 8 else 7):
        raise ValueError(
            "`weights` must be so small that a float16 can represent their scales. "
            f"Received: a weight of {largest:g}"
        )


def _search_scales(weights, extreme):
    """Returns the scales, float32 `(outputs, groups)`, with the least squared errors.

    For each candidate the integers are rounded, and their best scale is the solution of
    the least-squares problem, by which the squared error shrinks by `gain`.
    """
    best = np.zeros_like(extreme)
    best_gain = np.full_like(extreme, -1)
    for divisor in _EXTREMES:
        inverse = inverse_scales(extreme / np.float32(divisor))[..., None]
        with np.errstate(invalid="ignore"):
            integers = np.rint(weights * inverse)
        np.clip(integers, -8, 7, out=integers)
        products = np.einsum("...i,...i", weights, integers)
        squares = np.einsum("...i,...i", integers, integers)
        scales = np.divide(
            products, squares, out=np.zeros_like(best), where=squares > 0
        )
        gain = products * scales
        better = gain > best_gain
        np.copyto(best, scales, where=better)
        np.copyto(best_gain, gain, where=better)
    return best
