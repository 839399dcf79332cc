"""A layer of `TorchNetwork` for one token per sequence, on CPUs.

On a CPU each operation takes longer than its computation for one token, and a step has
hundreds of them. So this layer has as few as possible.
"""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch.nn import functional

from keras_openllama.generation.pytorch.network import (
    LayerTensors,
    finish_layer,
    project,
    rms_norm,
)
from keras_openllama.layers.quantized_cache import (
    as_stored,
    attend_quantized,
    is_quantized_cache,
)

# See `attention_buffers`.
Buffers: TypeAlias = tuple[torch.Tensor, torch.Tensor]
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
    cache: tuple[torch.Tensor, ...],
    head_dim: int,
    epsilon: float,
    buffers: Buffers,
) -> torch.Tensor:
    """`network.decode_layer` for CPUs, with the same arguments except three.

    - `sin`: float32 `(batch, 1, 2, head_dim / 2)`, for the first half of a head with
      the opposite sign.
    - `column`: not used; the last one of `bias` is written.
    - `buffers`: see `attention_buffers`.
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
    updates = as_stored(cache, rotated[:, -heads:], value)
    for tensor, update in zip(cache, updates, strict=True):
        by_head = tensor.unflatten(0, (heads, batch))
        by_head.select(2, used - 1).copy_(update.transpose(0, 1))
    in_use = [tensor.narrow(1, 0, used) for tensor in cache]
    if is_quantized_cache(cache):
        bias = bias.repeat(heads, 1)[:, None]
        context = attend_quantized(query[:, :, None], in_use, bias, None)
    else:
        context = attend_in_float32(query, *in_use, bias, buffers)
    context = context.to(x.dtype).view(batch, 1, -1, head_dim)
    return finish_layer(x, context, layer, epsilon)


def rotate_heads(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """`network.rotate` for `(batch, heads, head_dim)`, to float32.

    `cos` and `sin` are those of `decode_layer_on_cpu`.
    """
    shape = x.shape
    x = x.float().view(*shape[:2], 2, -1)
    return torch.addcmul(x * cos, x.flip(-2), sin).view(shape)


def attention_buffers(cache: torch.Tensor, batch: int) -> Buffers:
    """Creates buffers for keys and values in float32.

    New memory for each product would cost page faults.

    Args:
        cache: keys of a layer, `(num_key_value_heads * batch, columns, head_dim)`.
        batch: number of sequences.
    """
    size = max(cache[:batch].numel(), min(cache.numel(), ATTENTION_BLOCK))
    size = 0 if cache.dtype == torch.float32 else size
    return tuple(torch.empty(size, device=cache.device) for _ in range(2))


def attend_in_float32(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor,
    buffers: Buffers,
) -> torch.Tensor:
    """Attention of one token per sequence.

    For a single query, products of 16 bits are several times as slow on a CPU as the
    conversion of keys and values to float32.

    Args:
        query: float32 `(batch, num_query_heads, head_dim)`.
        key: `(num_key_value_heads * batch, used, head_dim)`.
        value: like `key`.
        bias: float32 `(batch, used)`, see `TorchNetwork.decode`.
        buffers: see `attention_buffers`; overwritten.

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
            _to_float32(x[start * batch : (start + block) * batch], buffer)
            .view(-1, batch, used, head_dim)
            .transpose(0, 1)
            for x, buffer in zip((key, value), buffers, strict=True)
        )
        queries = folded[:, start : start + block]
        contexts.append(
            functional.scaled_dot_product_attention(
                queries, keys, values, attn_mask=bias
            )
        )
    context = contexts[0] if len(contexts) == 1 else torch.cat(contexts, dim=1)
    return context.reshape(query.shape)


def _to_float32(x, buffer):
    if x.dtype == torch.float32:
        return x
    return buffer[: x.numel()].view(x.shape).copy_(x)
