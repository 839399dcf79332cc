"""Quantized weights as tensors of the backend."""

from __future__ import annotations

from collections.abc import Callable

import keras
import numpy as np
from keras import ops

from keras_openllama.quantization.quantized_matrix import NIBBLE_ZERO
from keras_openllama.utils.types import Tensor

if keras.config.backend() == "jax":
    import jax
elif keras.config.backend() == "torch":
    import torch


def dequantize_tensor(
    values: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    *,
    bits: int,
    group_size: int,
    inputs: int,
    dtype: str,
) -> Tensor:
    """Returns the weights of a quantized matrix, or of some of its outputs.

    Args:
        values: `(..., columns)`, see `QuantizedMatrix.values`.
        scales: float16 `(..., groups)`.
        zeros: uint8 `(..., groups)`, or `None`.
        bits: 8 or 4.
        group_size: Number of inputs that share a scale.
        inputs: Number of inputs.
        dtype: Floating-point dtype of the result.

    Returns:
        Tensor `(..., inputs)`. Products are computed in float32 and rounded once.

    Example:
        >>> dequantize_tensor(
        ...     ops.convert_to_tensor([[3, -4]], "int8"), ops.ones((1, 1), "float16"),
        ...     None, bits=8, group_size=2, inputs=2, dtype="float32",
        ... ).tolist()
        [[3.0, -4.0]]
    """
    integers = values if bits == 8 else _unpack(values, inputs)
    if zeros is not None:
        zeros = ops.cast(zeros, "int8") - NIBBLE_ZERO
        integers = integers - _expand(zeros, group_size, inputs)
    scales = _expand(ops.cast(scales, "float32"), group_size, inputs)
    return ops.cast(ops.cast(integers, "float32") * scales, dtype)


def _unpack(packed, inputs):
    """Returns int8 values from -8 to 7, see `quantized_matrix.unpack_nibbles`."""
    if keras.config.backend() == "tensorflow":
        low = ops.bitwise_and(packed, np.uint8(15))
        high = ops.right_shift(packed, np.uint8(4))
    else:
        low, high = packed & 15, packed >> 4
    pairs = ops.stack([low, high], axis=-1)
    nibbles = ops.reshape(pairs, (*ops.shape(packed)[:-1], 2 * packed.shape[-1]))
    return ops.cast(nibbles[..., :inputs], "int8") - NIBBLE_ZERO


def _expand(groups, group_size, inputs):
    """Repeats what each group has for its inputs; one group is left to broadcast."""
    if groups.shape[-1] == 1:
        return groups
    return ops.repeat(groups, group_size, axis=-1)[..., :inputs]


def multiply_quantized(
    inputs: Tensor,
    values: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    dequantize: Callable[[Tensor, Tensor, Tensor | None], Tensor],
    multiply: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """Returns the product of inputs and a quantized matrix.

    The weights are dequantized when the inputs are available, and once more when the
    gradient is, so that one matrix of a model is in memory at a time. They have no
    gradients.

    Args:
        inputs: Float tensor `(..., inputs)`.
        values: See `QuantizedMatrix.values`.
        scales: See `QuantizedMatrix.scales`.
        zeros: See `QuantizedMatrix.zeros`.
        dequantize: Callable `(values, scales, zeros)` that returns the weights in the
            dtype of the inputs.
        multiply: Callable `(inputs, weights)` that returns `inputs @ weights.T`.

    Returns:
        Tensor `(..., outputs)`.
    """
    constants = (values, scales) if zeros is None else (values, scales, zeros)

    def weights_of(values, scales, zeros=None):
        return dequantize(values, scales, zeros)

    @ops.custom_gradient
    def product(inputs, *constants):
        def gradient(*arguments, upstream=None):
            if upstream is None:
                (upstream,) = arguments
            values, scales, *zeros = constants
            weights = weights_of(values, _wait_for(scales, upstream), *zeros)
            return ops.matmul(upstream, weights), *(None for _ in constants)

        values, scales, *zeros = constants
        weights = weights_of(values, _wait_for(scales, inputs), *zeros)
        return multiply(inputs, weights), gradient

    if keras.config.backend() == "torch" and not (
        torch.is_grad_enabled() and inputs.requires_grad
    ):
        return multiply(inputs, weights_of(*constants))
    return product(inputs, *constants)


def _wait_for(scales, tensor):
    """Makes the scales depend on a tensor on JAX.

    XLA dequantizes the weights of all layers first, and uses them for the gradients,
    unless these depend on what is computed later. On CPUs it drops barriers. There
    a number is added that is 0 for any tensor, which XLA does not notice.
    """
    if keras.config.backend() != "jax":
        return scales
    return jax.lax.platform_dependent(
        scales,
        tensor[(0,) * tensor.ndim],
        cpu=lambda scales, x: scales + ((x > 0) & (x < 0)).astype(scales.dtype),
        default=lambda scales, x: jax.lax.optimization_barrier((scales, x))[0],
    )
