"""Tensors of attention heads for the package's C functions, with PyTorch."""

from __future__ import annotations

from typing import Any

import torch

from keras_openllama.native.heads import Heads
from keras_openllama.native.library import native_library


def can_use_library(x: Any) -> bool:
    """Returns whether the C functions support a tensor, on this machine.

    They need float32 on a CPU for which `native_library` exists.

    Example:
        >>> import torch
        >>> can_use_library(torch.ones(1, 2, 3, 8, dtype=torch.bfloat16))
        False
    """
    return (
        not torch.compiler.is_compiling()  # First: the rest cannot be compiled.
        and type(x) in (torch.Tensor, torch.nn.Parameter)  # Others may have no memory.
        and not torch.jit.is_tracing()
        # `torch.func` does not support such functions.
        and not torch._C._are_functorch_transforms_active()
        and x.device.type == "cpu"
        and x.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and native_library() is not None
    )


def with_whole_heads(x: torch.Tensor) -> torch.Tensor:
    """Returns a tensor, or a copy, in which the elements of a head are contiguous.

    Example:
        >>> import torch
        >>> with_whole_heads(torch.ones(1, 2, 8, 3).mT).stride()
        (48, 24, 8, 1)
    """
    return x if x.stride(-1) == 1 else x.contiguous()


def heads_in_memory(x: torch.Tensor) -> Heads:
    """Returns the place of a tensor whose elements of a head are contiguous.

    Example:
        >>> import torch
        >>> heads_in_memory(torch.ones(1, 2, 3, 8)).strides
        (48, 24, 8)
    """
    return Heads(x.data_ptr(), x.stride()[:3])


def empty_heads(x: torch.Tensor) -> torch.Tensor:
    """Returns an empty tensor in the order of axes in which projections read it.

    Args:
        x: Tensor `(batch, heads, length, head_dim)`.

    Returns:
        Tensor of this shape, `(batch, length, heads, head_dim)` in memory.

    Example:
        >>> import torch
        >>> empty_heads(torch.ones(1, 2, 3, 8)).stride()
        (48, 8, 16, 1)
    """
    batch, heads, length, head_dim = x.shape
    return x.new_empty(batch, length, heads, head_dim).transpose(1, 2)
