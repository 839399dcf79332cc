"""The network with a KV cache as plain PyTorch functions.

Calls of Keras layers take longer in Python than the computation of one token. These
functions compute the same from the tensors of the layers. They have few operations, and
no shape in them depends on values, so that a decoding step can be captured in a CUDA
graph and compiled.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import keras
import torch
from torch.nn import functional

from keras_openllama.backend.keras_private import embeddings_variable, kernel_variable
from keras_openllama.generation.pytorch.onednn_weights import (
    PackedWeights,
    multiply_packed,
)
from keras_openllama.layers.attention_torch import fused_causal_attention
from keras_openllama.layers.matmul import multiply_with_torch
from keras_openllama.layers.quantized_cache import (
    as_stored,
    attend_quantized,
    is_quantized_cache,
)

if TYPE_CHECKING:
    from keras_openllama.backend.keras_hub import CausalLM


class Linear(NamedTuple):
    """A projection: its tensors, or the layer itself if it is quantized.

    Attributes:
        kernel: `(outputs, inputs)`, or `None` for a quantized layer.
        adapters: the two factors of LoRA, `(outputs, rank)` and `(rank, inputs)`, or
            empty.
        scale: factor of the product of the adapters.
        layer: `Projection` if it is quantized, else `None`.
        packed: the kernel in the layout of `onednn_weights`, or `None`.
    """

    kernel: torch.Tensor | None
    adapters: tuple[torch.Tensor, ...] = ()
    scale: float = 1.0
    layer: keras.layers.Layer | None = None
    packed: torch.Tensor | None = None


class LayerTensors(NamedTuple):
    """The tensors of a `DecoderLayer`, in the order of their use."""

    attention_norm: torch.Tensor
    query: Linear
    key: Linear
    value: Linear
    output: Linear
    feedforward_norm: torch.Tensor
    gate: Linear
    up: Linear
    down: Linear


class TorchNetwork:
    """The tensors of a model, which stay those of the model's variables.

    Changes of values take effect. A network is invalid when variables or the storage of
    one are replaced, see `weights_key`.

    Args:
        model: `OpenLlamaCausalLM`.

    Attributes:
        has_keras_layers: whether Keras computes any projection or the embedding,
            because it is quantized, or the embedding has adapters. Keras copies
            constants from the host, which a CUDA graph cannot contain.
        run_layer: `decode_layer` of this network, a function that can be compiled.
    """

    def __init__(self, model: CausalLM) -> None:
        backbone = model.backbone
        self.model = model
        self.dtype = getattr(torch, backbone.compute_dtype)
        self.head_dim = backbone.head_dim
        self.epsilon = backbone.layer_norm_epsilon
        self.layers = [_layer_tensors(layer) for layer in backbone.transformer_layers]
        self.final_norm = _value(backbone.final_norm.scale)
        self.lm_head = _linear(model.lm_head)
        linears = [x for layer in self.layers for x in layer if isinstance(x, Linear)]
        linears.append(self.lm_head)
        self.has_keras_layers = _is_computed_by_keras(backbone.token_embedding) or any(
            linear.layer is not None for linear in linears
        )
        head_dim, epsilon = self.head_dim, self.epsilon

        def run_layer(*inputs):
            return decode_layer(*inputs, head_dim, epsilon)

        self.run_layer = run_layer

    def kernels(self) -> list[torch.Tensor]:
        """Returns the kernels of all projections that are not quantized."""
        linears = [x for layer in self.layers for x in layer if isinstance(x, Linear)]
        return [x.kernel for x in (*linears, self.lm_head) if x.layer is None]

    def use_packed(self, packed: PackedWeights) -> None:
        """Computes products with packed kernels.

        Args:
            packed: see `onednn_weights.PackedWeights`.
        """

        def replace(x):
            if not isinstance(x, Linear) or x.layer is not None:
                return x
            return x._replace(packed=packed.get(x.kernel))

        self.layers = [LayerTensors(*map(replace, layer)) for layer in self.layers]
        self.lm_head = replace(self.lm_head)

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """Returns the embeddings of `(batch, length)` tokens."""
        layer = self.model.backbone.token_embedding
        if _is_computed_by_keras(layer):
            return layer(tokens)
        table = _value(embeddings_variable(layer))
        return functional.embedding(tokens, table).to(self.dtype)

    def prefill(
        self,
        tokens: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        cache: tuple[tuple[torch.Tensor, ...], ...],
    ) -> None:
        """Writes the keys and values of prefixes to the first columns of the cache.

        Args:
            tokens: int `(batch, length)`.
            cos: float32 `(batch or 1, length, 1, head_dim / 2)`.
            sin: like `cos`.
            cache: see `kv_cache.py`; modified in place.
        """
        x = self.embed(tokens)
        layers = zip(self.layers, cache, strict=True)
        for number, (layer, tensors) in enumerate(layers):
            heads = project_heads(x, layer, cos, sin, self.head_dim, self.epsilon)
            write_prefix(tensors, *heads[1:])
            # Nothing reads what the last layer makes of its keys and values.
            if number < len(self.layers) - 1:
                query, key, value = (head.transpose(1, 2) for head in heads)
                context = fused_causal_attention(query, key, value)
                x = finish_layer(x, context.transpose(1, 2), layer, self.epsilon)

    def decode(
        self,
        tokens: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        bias: torch.Tensor,
        column: torch.Tensor,
        cache: tuple[tuple[torch.Tensor, ...], ...],
        run_layer: Callable[..., torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Feeds one token per sequence.

        Args:
            tokens: int `(batch, 1)`.
            cos: float32 `(batch, 1, 1, head_dim / 2)`.
            sin: like `cos`.
            bias: float32 `(batch, used)`, 0 for the visible columns of the cache and
                a large negative number for the others.
            column: int64 `(1,)`, where the keys and values are written.
            cache: see `kv_cache.py`; modified in place.
            run_layer: `run_layer` of this object, the default, or that compiled.

        Returns:
            Logits `(batch, vocabulary_size)`.
        """
        run_layer = run_layer or self.run_layer
        x = self.embed(tokens)
        for layer, tensors in zip(self.layers, cache, strict=True):
            x = run_layer(x, layer, cos, sin, bias, column, tensors)
        x = rms_norm(x, self.final_norm, self.epsilon)
        return project(x, self.lm_head)[:, 0]


def weights_key(model: CausalLM, versions: bool = False) -> list[tuple[int, ...]]:
    """Returns what changes when a `TorchNetwork` becomes invalid.

    That is when LoRA or quantization replaces variables, not when training changes
    values.

    Args:
        model: `OpenLlamaCausalLM`.
        versions: whether to include the versions of values, which packed weights
            depend on.

    Returns:
        The identity and the address of each weight.
    """
    values = [(weight, weight.value) for weight in model.weights]
    return [
        (id(weight), x.data_ptr(), x._version if versions else 0)
        for weight, x in values
    ]


def decode_layer(
    x: torch.Tensor,
    layer: LayerTensors,
    cos: torch.Tensor,
    sin: torch.Tensor,
    bias: torch.Tensor,
    column: torch.Tensor,
    cache: tuple[torch.Tensor, ...],
    head_dim: int,
    epsilon: float,
) -> torch.Tensor:
    """One layer of `TorchNetwork.decode`.

    Args:
        x: `(batch, 1, hidden_dim)`.
        layer: the tensors of the layer.
        cos: see `TorchNetwork.decode`, as the next three.
        sin: see there.
        bias: see there.
        column: see there.
        cache: the cache of the layer; one column is written in place.
        head_dim: size of a head.
        epsilon: epsilon of the norms.

    Returns:
        Hidden states `(batch, 1, hidden_dim)`.
    """
    query, key, value = project_heads(x, layer, cos, sin, head_dim, epsilon)
    updates = as_stored(cache, heads_and_batch(key), heads_and_batch(value))
    for tensor, update in zip(cache, updates, strict=True):
        tensor.index_copy_(1, column, update)
    used = [tensor[:, : bias.shape[1]] for tensor in cache]
    if is_quantized_cache(cache):
        bias = bias.repeat(key.shape[2], 1)[:, None]
        context = attend_quantized(query.transpose(1, 2), used, bias, None)
        context = context.transpose(1, 2)
    else:
        context = attend(query, *used, bias)
    return finish_layer(x, context, layer, epsilon)


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    """Attention of one token per sequence over the used columns of the cache.

    Args:
        query: `(batch, 1, heads, head_dim)`.
        key: `(num_key_value_heads * batch, used, head_dim)`.
        value: like `key`.
        bias: see `TorchNetwork.decode`.

    Returns:
        A tensor of the shape of `query`.
    """
    batch, _, heads, head_dim = query.shape
    kv_heads, used = len(key) // batch, bias.shape[1]
    # The query heads that share a key/value head are columns of one matrix.
    query = query.reshape(batch, kv_heads, heads // kv_heads, head_dim)
    query = query.transpose(0, 1).reshape(kv_heads * batch, -1, head_dim)
    scores = torch.bmm(key, query.transpose(1, 2))
    scores = scores.float().view(kv_heads, batch, used, -1) * head_dim**-0.5
    weights = torch.softmax(scores + bias[None, :, :, None], dim=2)
    weights = weights.to(value.dtype).view(kv_heads * batch, used, -1)
    context = torch.bmm(weights.transpose(1, 2), value)
    context = context.view(kv_heads, batch, -1, head_dim).transpose(0, 1)
    return context.reshape(batch, 1, heads, head_dim)


def project_heads(
    x: torch.Tensor,
    layer: LayerTensors,
    cos: torch.Tensor,
    sin: torch.Tensor,
    head_dim: int,
    epsilon: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns rotated queries and keys, and values, `(batch, length, heads, head_dim)`.

    Args:
        x: `(batch, length, hidden_dim)`.
        layer: the tensors of the layer.
        cos: float32 `(batch or 1, length, 1, head_dim / 2)`.
        sin: like `cos`.
        head_dim: size of a head.
        epsilon: epsilon of the norm.
    """
    batch, length, _ = x.shape
    x = rms_norm(x, layer.attention_norm, epsilon)
    query, key, value = (
        project(x, linear).view(batch, length, -1, head_dim)
        for linear in (layer.query, layer.key, layer.value)
    )
    rotated = rotate(torch.cat([query, key], dim=2), cos, sin)
    query, key = rotated.split([query.shape[2], key.shape[2]], dim=2)
    return query, key, value


def finish_layer(
    x: torch.Tensor, context: torch.Tensor, layer: LayerTensors, epsilon: float
) -> torch.Tensor:
    """Returns the output of a layer from the context of its attention.

    Args:
        x: `(batch, length, hidden_dim)`, the input of the layer.
        context: `(batch, length, heads, head_dim)`.
        layer: the tensors of the layer.
        epsilon: epsilon of the norm.
    """
    x = x + project(context.flatten(2), layer.output)
    normed = rms_norm(x, layer.feedforward_norm, epsilon)
    gate = functional.silu(project(normed, layer.gate))
    return x + project(gate * project(normed, layer.up), layer.down)


def project(x: torch.Tensor, linear: Linear) -> torch.Tensor:
    """Returns the projection of `(batch, length, inputs)`, adapters included."""
    if linear.layer is not None:
        return linear.layer(x)
    if linear.packed is not None:
        y = multiply_packed(x, linear.packed)
    else:
        kernel = linear.kernel
        if kernel.dtype != x.dtype:
            kernel = kernel.to(x.dtype)
        y = multiply_with_torch(x, kernel)
    if linear.adapters:
        outputs, inputs = (factor.to(x.dtype) for factor in linear.adapters)
        added = functional.linear(functional.linear(x, inputs), outputs)
        y = y + linear.scale * added
    return y


def rms_norm(x: torch.Tensor, scale: torch.Tensor, epsilon: float) -> torch.Tensor:
    """`RMSNorm` of the last axis, computed in float32 and rounded once."""
    if scale.dtype != x.dtype:  # PyTorch warns of unequal dtypes.
        normed = functional.rms_norm(x.float(), x.shape[-1:], scale.float(), epsilon)
        return normed.to(x.dtype)
    return functional.rms_norm(x, x.shape[-1:], scale, epsilon)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """`rotary_embedding.rotate` for heads `(batch, length, heads, head_dim)`."""
    # Few operations: each takes longer than its computation for one token.
    halves = x.float().unflatten(-1, (2, -1))
    signed_sin = torch.stack([-sin, sin], dim=-2)
    rotated = torch.addcmul(halves * cos[..., None, :], halves.flip(-2), signed_sin)
    return rotated.flatten(-2).to(x.dtype)


def heads_and_batch(x: torch.Tensor) -> torch.Tensor:
    """`(batch, 1, heads, head_dim)` to the layout of the cache, with one column."""
    batch, _, heads, head_dim = x.shape
    return x.reshape(batch, heads, head_dim).transpose(0, 1).reshape(-1, 1, head_dim)


def write_prefix(
    cache: tuple[torch.Tensor, ...], key: torch.Tensor, value: torch.Tensor
) -> None:
    """Writes `(batch, length, heads, head_dim)` to the first columns of a cache."""
    batch, length, heads, _ = key.shape
    updates = as_stored(cache, key, value)
    for tensor, update in zip(cache, updates, strict=True):
        by_head = tensor.unflatten(0, (heads, batch))
        by_head[:, :, :length] = update.movedim(2, 0)


def _layer_tensors(layer):
    attention, feedforward = layer.self_attention, layer.feedforward
    return LayerTensors(
        attention_norm=_value(layer.self_attention_norm.scale),
        query=_linear(attention.query),
        key=_linear(attention.key),
        value=_linear(attention.value),
        output=_linear(attention.output_projection),
        feedforward_norm=_value(layer.feedforward_norm.scale),
        gate=_linear(feedforward.gate),
        up=_linear(feedforward.up),
        down=_linear(feedforward.down),
    )


def _linear(layer):
    if layer.quantization_mode is not None:
        return Linear(None, layer=layer)
    adapters = tuple(_value(x) for x in layer.adapters().values())
    scale = layer.lora_alpha / layer.lora_rank if adapters else 1.0
    return Linear(_value(kernel_variable(layer)), adapters, scale)


def _is_computed_by_keras(embedding):
    return embedding.quantization_mode is not None or embedding.lora_enabled


def _value(variable):
    """The tensor of a variable: no copy, and not a `torch.nn.Parameter`."""
    return variable.value.detach()
