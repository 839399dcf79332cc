"""Causal attention by fused kernels, which store no scores.

In float32 on CPUs it is the package's own kernel, otherwise PyTorch's.
"""

from __future__ import annotations

import torch

from keras_openllama.layers.cached_attention import MASKED_SCORE
from keras_openllama.layers.compiled_attention_torch import (
    compiled_causal_attention,
    is_compiled,
)

# Heuristic: queries that are computed together on a CPU, over the keys up to the last
# of them. The kernel is slower with fewer than 192 queries.
QUERY_BLOCK = 192


class FusedAttention:
    """`attention.causal_attention` of layers that share a mask, converted once.

    On a CPU, `compiled_causal_attention` is used where there is one. Otherwise, queries
    are computed in blocks there, which skips most of what the mask hides.

    Call arguments:
        query: Float tensor `(batch, num_query_heads, length, head_dim)`.
        key: Float tensor `(batch, num_key_value_heads, length, head_dim)`.
        value: Float tensor of the shape of `key`.
        mask: Bool tensor `(batch or 1, 1, length, length)`, False for every later
            position.
        documents: Ignored; see `attention_kernels.select_attention`.

    Returns:
        Tensor of the shape of `query` with the dtype of `value`.

    Example:
        >>> import torch
        >>> query, mask = torch.ones(1, 2, 3, 8), torch.ones(1, 1, 3, 3).tril().bool()
        >>> FusedAttention()(query, query, query, mask).shape
        torch.Size([1, 2, 3, 8])
    """

    def __init__(self) -> None:
        self._mask = self._bias = None

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor,
        documents: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Returns the context."""
        if is_compiled(query, key, value, mask):
            return compiled_causal_attention(query, key, value, mask)
        if mask is not self._mask or query.dtype != self._bias.dtype:
            self._mask, self._bias = mask, _bias(mask, query.dtype)
        length, device = query.shape[2], query.device.type
        if device != "cpu" or not isinstance(length, int) or length <= QUERY_BLOCK:
            return _attend(query, key, value, self._bias)
        contexts = []
        for start in range(0, length, QUERY_BLOCK):
            end = min(start + QUERY_BLOCK, length)
            context = _attend(
                query[:, :, start:end],
                key[:, :, :end],
                value[:, :, :end],
                self._bias[:, :, start:end, :end],
            )
            contexts.append(context.transpose(1, 2))
        # In the order of axes that the output projection needs.
        return torch.cat(contexts, dim=1).transpose(1, 2)


def _bias(mask, dtype):
    # Finite, as in `dot_product_attention`. The range of float16 is smaller.
    masked = max(MASKED_SCORE, torch.finfo(dtype).min)
    return torch.where(mask, 0.0, masked).to(dtype)


def _attend(query, key, value, bias):
    head_dim = query.shape[-1]
    padding = head_padding(head_dim, query.device.type)
    if padding:
        query, key, value = (
            torch.nn.functional.pad(x, (0, padding)) for x in (query, key, value)
        )
    context = torch.nn.functional.scaled_dot_product_attention(
        *(query, key, value),
        attn_mask=bias,
        scale=head_dim**-0.5,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return context[..., :head_dim]


def fused_causal_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> torch.Tensor:
    """Causal attention without padding.

    Args:
        query: Float tensor `(batch, num_query_heads, length, head_dim)`.
        key: Float tensor `(batch, num_key_value_heads, length, head_dim)`.
        value: Float tensor of the shape of `key`.

    Returns:
        Tensor of the shape of `query`.

    Example:
        >>> import torch
        >>> query = torch.ones(1, 2, 3, 8)
        >>> fused_causal_attention(query, query, query).shape
        torch.Size([1, 2, 3, 8])
    """
    return torch.nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, enable_gqa=query.shape[1] != key.shape[1]
    )


def head_padding(head_dim: int, device_type: str) -> int:
    """Returns the zeros to append to each head for the fused kernels.

    On a GPU the kernels that accept a mask need heads of a multiple of 16 bytes in
    bfloat16. Otherwise PyTorch stores all scores. The heads of the 3B models have 100
    elements.

    Args:
        head_dim: Size of a head.
        device_type: Type of a `torch.device`, such as `"cuda"` or `"cpu"`.

    Example:
        >>> head_padding(100, "cuda"), head_padding(100, "cpu")
        (4, 0)
    """
    return -head_dim % 8 if device_type == "cuda" else 0
