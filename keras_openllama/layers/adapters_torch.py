"""The product with LoRA adapters on a CPU with PyTorch, in few passes over memory."""

from __future__ import annotations

import torch

from keras_openllama.layers.matmul import has_onednn_products
from keras_openllama.layers.onednn_linear import multiply


def can_add_adapters(inputs: torch.Tensor) -> bool:
    """Returns whether `add_adapters` pays: in training, with products that are fast.

    Args:
        inputs: Float tensor, the inputs of the projection.

    Example:
        >>> import torch
        >>> with torch.no_grad():
        ...     can_add_adapters(torch.ones(2, 2))
        False
    """
    return (
        not torch.compiler.is_compiling()
        and torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and inputs.device.type == "cpu"
        and (inputs.dtype == torch.float32 or has_onednn_products(inputs.dtype))
    )


def add_adapters(
    outputs: torch.Tensor,
    inputs: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Returns `outputs + scale * inputs @ b.T @ a.T`.

    It has first derivatives only.

    Args:
        outputs: Float tensor `(..., outputs)`, the product with the kernel.
        inputs: Tensor `(..., inputs)` of the same dtype.
        a: Tensor `(outputs, rank)` of that dtype.
        b: Tensor `(rank, inputs)` of that dtype.
        scale: The adapters' alpha divided by their rank.

    Returns:
        Tensor of the shape and dtype of `outputs`.

    Example:
        >>> import torch
        >>> ones = torch.ones(2, 2)
        >>> add_adapters(ones, ones, ones, ones, scale=0.5)
        tensor([[3., 3.],
                [3., 3.]])
    """
    added = _AddAdapters.apply(
        outputs.flatten(0, -2), inputs.flatten(0, -2), a, b, scale
    )
    return added.view(outputs.shape)


class _AddAdapters(torch.autograd.Function):
    """Of matrices; see `add_adapters`."""

    @staticmethod
    def forward(ctx, outputs, inputs, a, b, scale):
        narrow = multiply(inputs, b)
        ctx.save_for_backward(inputs, narrow, a, b)
        ctx.scale = scale
        return torch.addmm(outputs, narrow, a.T, alpha=scale)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, slopes):
        inputs, narrow, a, b = ctx.saved_tensors
        _, needs_inputs, needs_a, needs_b, _ = ctx.needs_input_grad
        of_inputs = of_a = of_b = None
        of_narrow = multiply(slopes, (ctx.scale * a).T)
        if needs_inputs:
            of_inputs = of_narrow @ b
        if needs_a:
            # In this order: MKL is slow where the result has few columns.
            of_a = ((ctx.scale * narrow).T @ slopes).T.contiguous()
        if needs_b:
            of_b = of_narrow.T @ inputs
        return slopes, of_inputs, of_a, of_b, None
