"""Causal attention of training on CPUs by the package's C function, with PyTorch."""

from __future__ import annotations

import torch

from keras_openllama.layers.heads_torch import (
    can_use_library,
    empty_heads,
    heads_in_memory,
    with_whole_heads,
)
from keras_openllama.native.causal_attention import CausalAttention
from keras_openllama.native.library import native_library


def is_compiled(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor
) -> bool:
    """Returns whether `compiled_causal_attention` supports tensors, on this machine.

    Example:
        >>> import torch
        >>> query = torch.ones(1, 2, 3, 8, dtype=torch.bfloat16)
        >>> is_compiled(query, query, query, torch.ones(1, 1, 3, 3, dtype=torch.bool))
        False
    """
    # First: while a model is exported, sizes are symbols, which stay free if unused.
    if not all(map(can_use_library, (query, key, value))):
        return False
    batch, _, length, _ = query.shape
    # Other masks that are broadcast are left to PyTorch.
    shapes = (1, 1, length, length), (batch, 1, length, length)
    return (
        mask.device.type == "cpu" and mask.dtype == torch.bool and mask.shape in shapes
    )


def compiled_causal_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """`attention.causal_attention` by the C function, with first derivatives only.

    The backward pass recomputes the attention weights from a sum per query.

    Args:
        query: float32 tensor `(batch, num_query_heads, length, head_dim)`.
        key: float32 tensor `(batch, num_key_value_heads, length, head_dim)`.
        value: float32 tensor of the shape of `key`.
        mask: Bool tensor `(batch or 1, 1, length, length)`, False for every later
            position.

    Returns:
        float32 tensor of the shape of `query`, in the order of axes in memory that the
        output projection needs: `(batch, length, num_query_heads, head_dim)`. Queries
        that may attend to no key are 0.

    Example:
        >>> import torch
        >>> query, mask = torch.ones(1, 2, 3, 8), torch.ones(1, 1, 3, 3).tril().bool()
        >>> if is_compiled(query, query, query, mask):
        ...     context = compiled_causal_attention(query, query, query, mask)
    """
    return _CausalAttention.apply(query, key, value, mask)


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, mask):
        query, key, value = (with_whole_heads(x) for x in (query, key, value))
        output, mask = empty_heads(query), mask.contiguous()
        log_sums = query.new_empty(query.shape[:3])
        saved = query, key, value, mask, output, log_sums
        _attention(*saved).forward()
        ctx.save_for_backward(*saved)
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, output_gradient):
        saved = ctx.saved_tensors  # Once: a checkpoint unpacks them only once.
        query, key, value, *_ = saved
        gradients = [empty_heads(x) for x in (query, key, value)]
        names = "query_gradient", "key_gradient", "value_gradient"
        output_gradient = with_whole_heads(output_gradient)
        _attention(*saved).backward(
            output_gradient=heads_in_memory(output_gradient),
            **{
                name: heads_in_memory(x)
                for name, x in zip(names, gradients, strict=True)
            },
        )
        return *gradients, None


def _attention(query, key, value, mask, output, log_sums):
    batch, num_query_heads, length, head_dim = query.shape
    num_heads = key.shape[1]
    return CausalAttention(
        native_library().path,
        (batch, num_heads, num_query_heads // num_heads, length, head_dim),
        threads=torch.get_num_threads(),
        mask=mask.data_ptr(),
        is_mask_shared=len(mask) == 1,
        log_sums=log_sums.data_ptr(),
        query=heads_in_memory(query),
        key=heads_in_memory(key),
        value=heads_in_memory(value),
        output=heads_in_memory(output),
    )
