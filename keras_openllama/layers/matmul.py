"""The product with a transposed kernel, as projections compute it."""

from __future__ import annotations

import functools
import math

import keras
from keras import ops

from keras_openllama.utils.types import Tensor

if keras.config.backend() == "jax":
    import jax
elif keras.config.backend() == "torch":
    import torch

    from keras_openllama.layers.onednn_linear import multiply

# Heuristic: with this many rows the product is compute-bound on a CPU in either order
# of operands.
MANY_ROWS = 128
# Heuristic: outputs of a block on PyTorch, which fits in the cache of a core.
OUTPUT_BLOCK = 64
# Heuristic: from so many rows on, a product of 16 bits is limited by the computation.
SOME_ROWS = 16


def matmul_transposed(inputs: Tensor, kernel: Tensor) -> Tensor:
    """Returns `inputs @ kernel.T`, in the order of operands that is fastest.

    Args:
        inputs: Float tensor `(..., inputs)`.
        kernel: Tensor `(outputs, inputs)` of the same dtype.

    Returns:
        Tensor `(..., outputs)` of that dtype.

    Example:
        >>> matmul_transposed(ops.ones((1, 2, 3)), ops.ones((4, 3))).shape
        (1, 2, 4)
    """
    kernel = ops.convert_to_tensor(kernel)
    if keras.config.backend() == "jax":
        return _multiply_on_platform()(inputs, kernel)
    if keras.config.backend() == "torch":
        return multiply_with_torch(inputs, kernel)
    return _multiply(inputs, kernel)


def _is_few(rows):
    """Whether there are few rows. A number unknown at an export counts as many."""
    return isinstance(rows, int) and rows < MANY_ROWS


def multiply_with_torch(inputs: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
    """`matmul_transposed` on PyTorch.

    Args:
        inputs: `(..., inputs)`.
        kernel: `(outputs, inputs)` of the same dtype.
    """
    linear = torch.nn.functional.linear
    rows = math.prod(inputs.shape[:-1])
    if inputs.device.type != "cpu" or not isinstance(rows, int):
        return linear(inputs, kernel)
    if inputs.dtype.itemsize == 4:
        if not _is_few(rows):
            return multiply(inputs, kernel)
        use_blocks = len(kernel) % OUTPUT_BLOCK == 0
        return (_multiply_by_blocks if use_blocks else linear)(inputs, kernel)
    if rows == 1 and not torch.backends.mkldnn.enabled:
        # 5 % faster than `linear` in 16 bits.
        return torch.mv(kernel, inputs.reshape(-1)).view(*inputs.shape[:-1], -1)
    if inputs.dtype.itemsize != 2 or rows < SOME_ROWS:
        return linear(inputs, kernel)
    if not has_onednn_products(inputs.dtype):
        return linear(inputs.float(), kernel.float()).to(inputs.dtype)
    if not _is_few(rows):
        return linear(inputs, kernel)
    # With the weights on the left, oneDNN does not rearrange them.
    outputs = (kernel @ inputs.reshape(rows, -1).T).T
    return outputs.reshape(*inputs.shape[:-1], len(kernel))


def has_onednn_products(dtype: torch.dtype) -> bool:
    """Returns whether this processor multiplies matrices of 16 bits fast (PyTorch).

    Without support by oneDNN, PyTorch multiplies row by row: it reads the weights at
    the rate of the memory for each. That needs AVX-512 for bfloat16, and its extension
    for float16.

    Args:
        dtype: `torch.bfloat16` or `torch.float16`.
    """
    onednn = torch.ops.mkldnn
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):
        return False
    if dtype == torch.bfloat16:
        return onednn._is_mkldnn_bf16_supported()
    return onednn._is_mkldnn_fp16_supported()


def _multiply_by_blocks(inputs, kernel):
    """A batch of products with blocks; MKL's single product of a few rows is slower."""
    x = inputs.reshape(-1, inputs.shape[-1])
    blocks = kernel.view(-1, OUTPUT_BLOCK, kernel.shape[1]).transpose(1, 2)
    outputs = (x @ blocks).transpose(0, 1)
    return outputs.reshape(*inputs.shape[:-1], len(kernel))


@functools.cache
def _multiply_on_platform():
    """The implementation is chosen at compilation, by the platform of the program."""
    return jax.jit(
        lambda *operands: jax.lax.platform_dependent(
            *operands, cpu=_multiply_on_cpu, default=_multiply
        )
    )


def _multiply(inputs, kernel):
    return ops.matmul(inputs, ops.transpose(kernel))


def _multiply_on_cpu(inputs, kernel):
    """Makes the weights the left operand, which XLA on a CPU reads in place.

    XLA packs the right operand first: it is read, written and read again. XLA's
    matrix-vector kernel does not pack, but it is slow in bfloat16. There two or more
    rows have a fast kernel, with float32 accumulation.
    """
    barrier = jax.lax.optimization_barrier
    rows = math.prod(inputs.shape[:-1])
    is_bfloat16 = inputs.dtype == "bfloat16"
    # Of matrices, the kernel's gradient is a product of matrices, too. With more axes,
    # XLA would write transposed copies of its operands.
    x = inputs.reshape(rows, inputs.shape[-1])
    if not is_bfloat16 and not _is_few(rows):
        return _multiply(x, kernel).reshape(*inputs.shape[:-1], len(kernel))
    if is_bfloat16 and rows == 1:
        x = jax.numpy.concatenate([x, x])
    columns = jax.lax.dot_general(
        kernel,
        barrier(x),  # Otherwise XLA recomputes the inputs for each output.
        (((1,), (1,)), ((), ())),
        preferred_element_type="float32" if is_bfloat16 else None,
    )
    # Without the barrier, XLA swaps the operands to avoid the transposition.
    outputs = barrier(columns).T[:rows].astype(inputs.dtype)
    return outputs.reshape(*inputs.shape[:-1], len(kernel))
