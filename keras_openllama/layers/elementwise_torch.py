"""Elementwise functions on PyTorch whose gradients take few passes over the memory.

On a CPU these functions are limited by the memory. The backward pass of each saves its
inputs alone.
"""

from __future__ import annotations

import torch

# Heuristic: elements of the parts that stay in the cache of a core between operations.
PART = 1 << 16


def silu_times(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Returns `silu(gate) * up`.

    Args:
        gate: Float tensor `(..., features)`.
        up: Tensor of the shape and dtype of `gate`.

    Returns:
        Tensor of that shape and dtype.

    Example:
        >>> import torch
        >>> silu_times(torch.zeros(2, 3), torch.ones(2, 3)).shape
        torch.Size([2, 3])
    """
    return _SiluTimes.apply(gate, up)


def rms_norm(x: torch.Tensor, scale: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Divides the last axis by its root mean square and scales it.

    Args:
        x: Float tensor `(..., features)`.
        scale: float32 tensor `(features,)`.
        epsilon: Added to the mean square.

    Returns:
        float32 tensor of the shape of `x`.

    Example:
        >>> import torch
        >>> rms_norm(torch.ones(1, 4), torch.ones(4), 0.0)
        tensor([[1., 1., 1., 1.]])
    """
    return _RMSNorm.apply(x, scale, epsilon)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """`rotary_embedding.rotate`; the tables have no gradient.

    Args:
        x: Float tensor `(batch, heads, length, head_dim)`.
        cos: float32 tensor `(batch or 1, 1, length, head_dim / 2)`.
        sin: float32 tensor of the shape of `cos`.

    Returns:
        Tensor of the shape and dtype of `x`.

    Example:
        >>> import torch
        >>> x, sin = torch.tensor([[[[1.0, 0.0]]]]), torch.ones(1, 1, 1, 1)
        >>> rotate(x, torch.zeros_like(sin), sin)
        tensor([[[[0., 1.]]]])
    """
    return _Rotate.apply(x, cos, sin)


class _SiluTimes(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return torch.nn.functional.silu(gate).mul_(up)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, slopes):
        gate, up = (x.flatten(0, -2) for x in ctx.saved_tensors)
        shape, slopes = slopes.shape, slopes.flatten(0, -2)
        of_gate, of_up = torch.empty_like(gate), torch.empty_like(up)
        rows = max(1, PART // gate.shape[-1])
        parts = (x.split(rows) for x in (gate, up, slopes, of_gate, of_up))
        for g, u, slope, to_gate, to_up in zip(*parts, strict=True):
            torch.mul(torch.nn.functional.silu(g), slope, out=to_up)
            torch.ops.aten.silu_backward(slope * u, g, grad_input=to_gate)
        return of_gate.view(shape), of_up.view(shape)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scale, epsilon):
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        inverse = norm.square_().div_(x.shape[-1]).add_(epsilon).rsqrt_()
        ctx.save_for_backward(x, scale, inverse)
        return (x * inverse).mul_(scale)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, slopes):
        x, scale, inverse = ctx.saved_tensors
        x = x.float()
        of_scale = None
        if ctx.needs_input_grad[1]:
            of_scale = (x * inverse).mul_(slopes).flatten(0, -2).sum(0)
        of_x = None
        if ctx.needs_input_grad[0]:
            of_x = slopes * scale
            total = (of_x * x).sum(-1, keepdim=True)
            factor = total.mul_(inverse**3).div_(x.shape[-1])
            of_x.mul_(inverse).addcmul_(x, factor, value=-1)
            of_x = of_x.to(ctx.saved_tensors[0].dtype)
        return of_x, of_scale, None


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin, 1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, slopes):
        return _turn(slopes, *ctx.saved_tensors, -1), None, None


def _turn(x, cos, sin, direction):
    """Rotates in float32 by the angles times 1 or -1."""
    first, second = x.float().chunk(2, dim=-1)
    outputs = torch.empty_like(x, dtype=torch.float32)
    to_first, to_second = outputs.chunk(2, dim=-1)
    torch.mul(first, cos, out=to_first).addcmul_(second, sin, value=-direction)
    torch.mul(second, cos, out=to_second).addcmul_(first, sin, value=direction)
    return outputs.to(x.dtype)
