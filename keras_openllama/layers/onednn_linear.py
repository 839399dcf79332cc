"""float32 products by oneDNN on CPUs with PyTorch.

PyTorch multiplies float32 matrices with MKL, which does not use all instructions of
AMD's processors: oneDNN is 12 % faster there (`benchmarks/README.md`).
"""

from __future__ import annotations

import functools

import torch

from keras_openllama.utils.processor import is_amd


def multiply(inputs: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
    """Returns `inputs @ kernel.T`, by oneDNN where that is faster than by MKL.

    For a float32 kernel that is not trained, the inputs are not saved. By oneDNN it has
    first derivatives only.

    Args:
        inputs: Float tensor `(..., inputs)` of many rows.
        kernel: Tensor `(outputs, inputs)` of the same dtype.

    Returns:
        Tensor `(..., outputs)` of that dtype.

    Example:
        >>> import torch
        >>> multiply(torch.ones(200, 3), torch.ones(4, 3)).shape
        torch.Size([200, 4])
    """
    if uses_onednn(inputs):
        return _Linear.apply(inputs, kernel)
    return torch.nn.functional.linear(inputs, kernel)


def uses_onednn(inputs: torch.Tensor) -> bool:
    """Returns whether `multiply` calls oneDNN itself.

    Example:
        >>> import torch
        >>> uses_onednn(torch.ones(2, 3, dtype=torch.bfloat16))
        False
    """
    return (
        not torch.compiler.is_compiling()  # First: the rest cannot be compiled.
        and inputs.dtype == torch.float32
        and inputs.device.type == "cpu"
        and _has_slow_mkl()
        and torch.backends.mkldnn.enabled
        and not torch.is_autocast_enabled("cpu")
    )


@functools.cache
def _has_slow_mkl():
    return torch.backends.mkldnn.is_available() and is_amd()


class _Linear(torch.autograd.Function):
    """Of inputs `(..., inputs)` and a kernel `(outputs, inputs)`."""

    @staticmethod
    def forward(ctx, inputs, kernel):
        ctx.save_for_backward(inputs if ctx.needs_input_grad[1] else None, kernel)
        return _product(inputs, kernel)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, slopes):
        inputs, kernel = ctx.saved_tensors
        of_inputs = of_kernel = None
        if ctx.needs_input_grad[0]:
            of_inputs = _product(slopes, kernel.T)
        if ctx.needs_input_grad[1]:  # MKL is as fast here.
            of_kernel = slopes.flatten(0, -2).T @ inputs.flatten(0, -2)
        return of_inputs, of_kernel


def _product(inputs, kernel):
    return torch.ops.mkldnn._linear_pointwise(inputs, kernel, None, "none", [], "")
