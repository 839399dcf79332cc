"""Rotary position embedding on CPUs by the package's C function, with PyTorch."""

from __future__ import annotations

import torch

from keras_openllama.layers.heads_torch import (
    can_use_library,
    empty_heads,
    heads_in_memory,
    with_whole_heads,
)
from keras_openllama.native.library import native_library
from keras_openllama.native.rotation import rotate_heads

# Heuristic: elements from which on one pass over memory pays.
MIN_ELEMENTS = 2**15


def is_rotation_compiled(x: torch.Tensor) -> bool:
    """Returns whether `compiled_rotate` is faster for a tensor, on this machine.

    Example:
        >>> import torch
        >>> is_rotation_compiled(torch.ones(1, 2, 1, 8))
        False
    """
    # Sizes last: they are symbols while a model is exported.
    return can_use_library(x) and x.numel() >= MIN_ELEMENTS


def compiled_rotate(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> torch.Tensor:
    """`rotary_embedding.rotate` by the C function, with first derivatives only.

    Args:
        x: float32 tensor `(batch, heads, length, head_dim)`.
        cos: float32 tensor `(batch or 1, 1, length, head_dim / 2)`, a constant.
        sin: float32 tensor of the shape of `cos`, a constant.

    Returns:
        Tensor of the shape of `x`, `(batch, length, heads, head_dim)` in memory.

    Example:
        >>> import torch
        >>> x, table = torch.ones(1, 8, 64, 64), torch.ones(1, 1, 64, 32)
        >>> if is_rotation_compiled(x):
        ...     rotated = compiled_rotate(x, table, table)
    """
    return _Rotation.apply(x, cos, sin)


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cos, sin):
        tables = cos.contiguous(), sin.contiguous()
        ctx.save_for_backward(*tables)
        return _rotated(x, *tables, direction=1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        return _rotated(gradient, *ctx.saved_tensors, direction=-1), None, None


def _rotated(x, cos, sin, direction):
    x, target = with_whole_heads(x), empty_heads(x)
    rotate_heads(
        native_library().path,
        heads_in_memory(x),
        heads_in_memory(target),
        tuple(x.shape),
        tables=(cos.data_ptr(), sin.data_ptr()),
        is_table_shared=len(cos) == 1,
        threads=torch.get_num_threads(),
        direction=direction,
    )
    return target
