"""A layer of `TorchNetwork` for one token per sequence, on CPUs.

On a CPU each operation takes longer than its computation for one token, and a step has
hundreds of them. So this layer has as few as possible.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from keras_openllama.generation.torch_network import (
    LayerTensors,
    finish_layer,
    project,
    rms_norm,
)

# Heuristic: elements of the keys of a block of heads, which fit in the processor's
# cache in float32.
ATTENTION_BLOCK = 1 << 21


def decode_layer_on_cpu(
    x: torch.Tensor,
    layer: LayerTensors,
    cos: torch.Tensor,
    sin: torch.Tensor,
    bias: torch.Tensor,
    column: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    head_dim: int,
    epsilon: float,
) -> torch.Tensor:
    """`torch_network.decode_layer` for CPUs.

    Args:
        x: `(batch, 1, hidden_dim)`.
        layer: the tensors of the layer.
        cos: float32 `(batch, 1, 1, head_dim / 2)`.
        sin: float32 `(batch, 1, 2, head_dim / 2)`, for the first half of a head with
            the opposite sign.
        bias: see `TorchNetwork.decode`.
        column: not used; the last one of `bias` is written.
        key_cache: see `torch_network.decode_layer`, as the next three.
        value_cache: see there.
        head_dim: see there.
        epsilon: see there.

    Returns:
        Hidden states `(batch, 1, hidden_dim)`.
    """
    batch, used = len(x), bias.shape[1]
    normed = rms_norm(x, layer.attention_norm, epsilon)
    query, key, value = (
        project(normed, linear).view(batch, -1, head_dim)
        for linear in (layer.query, layer.key, layer.value)
    )
    heads = key.shape[1]
    rotated = rotate_heads(torch.cat([query, key], dim=1), cos, sin)
    query = rotated[:, :-heads]
    for cache, update in ((key_cache, rotated[:, -heads:]), (value_cache, value)):
        by_head = cache.view(heads, batch, -1, head_dim)
        by_head.select(2, used - 1).copy_(update.transpose(0, 1))
    context = attend_in_float32(
        query, key_cache.narrow(1, 0, used), value_cache.narrow(1, 0, used), bias
    )
    context = context.to(x.dtype).view(batch, 1, -1, head_dim)
    return finish_layer(x, context, layer, epsilon)


def rotate_heads(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates `(batch, heads, head_dim)` as `torch_network.rotate`, to float32.

    Args:
        x: `(batch, heads, head_dim)`.
        cos: see `decode_layer_on_cpu`.
        sin: see there.
    """
    shape = x.shape
    x = x.float().view(*shape[:2], 2, -1)
    return torch.addcmul(x * cos, x.flip(-2), sin).view(shape)


def attend_in_float32(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    """Attention of one token per sequence.

    For a single query, products of 16 bits are several times as slow on a CPU as the
    conversion of keys and values to float32.

    Args:
        query: float32 `(batch, num_query_heads, head_dim)`.
        key: `(num_key_value_heads * batch, used, head_dim)`.
        value: like `key`.
        bias: float32 `(batch, used)`, see `TorchNetwork.decode`.

    Returns:
        float32 `(batch, num_query_heads, head_dim)`.
    """
    batch, used, head_dim = len(query), *key.shape[1:]
    kv_heads = len(key) // batch
    # The query heads that share a key/value head are rows of one matrix.
    folded = query.view(batch, kv_heads, -1, head_dim)
    bias = bias.view(batch, 1, 1, used)
    block = max(1, min(kv_heads, ATTENTION_BLOCK // (batch * used * head_dim)))
    contexts = []
    for start in range(0, kv_heads, block):
        keys, values = (
            x[start * batch : (start + block) * batch]
            .float()
            .view(-1, batch, used, head_dim)
            .transpose(0, 1)
            for x in (key, value)
        )
        queries = folded[:, start : start + block]
        contexts.append(
            functional.scaled_dot_product_attention(
                queries, keys, values, attn_mask=bias
            )
        )
    context = contexts[0] if len(contexts) == 1 else torch.cat(contexts, dim=1)
    return context.reshape(query.shape)
