"""Quantizes the projections of a network by GPTQ, layer by layer."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import keras
import numpy as np
from keras import ops

from keras_openllama.backend.arrays import as_numpy
from keras_openllama.backend.keras_private import kernel_variable
from keras_openllama.layers.attention import causal_attention, causal_mask
from keras_openllama.layers.decoder_layer import DecoderLayer
from keras_openllama.layers.projection import Projection
from keras_openllama.quantization.gptq import round_with_hessian
from keras_openllama.quantization.quantized_matrix import QuantizedMatrix
from keras_openllama.quantization.settings import WeightQuantizationConfig
from keras_openllama.text.calibration_sequences import calibration_sequences
from keras_openllama.utils.progress import progress_bar
from keras_openllama.utils.types import Tensor

if keras.config.backend() == "torch":
    import torch

if TYPE_CHECKING:
    from keras_openllama.backend.keras_hub import Backbone

# Heuristic: tokens that run through a layer together.
_BATCH_TOKENS = 4096


def read_sequences(backbone: Backbone, config: Any) -> np.ndarray:
    """Returns the sequences of a `keras.quantizers.GPTQConfig`.

    Args:
        backbone: `OpenLlamaBackbone`.
        config: The configuration.

    Returns:
        int32 array `(sequences, length)`.

    Raises:
        ValueError: If they would be longer than the context, or see
            `calibration_sequences`.
    """
    context = backbone.context_length
    if config.sequence_length > context:
        raise ValueError(
            f"`sequence_length` must be at most {context}, the context of this model. "
            f"Received: sequence_length={config.sequence_length}"
        )
    return calibration_sequences(
        config.dataset,
        config.tokenizer,
        length=config.sequence_length,
        count=config.num_samples,
        vocabulary_size=backbone.vocabulary_size,
    )


def projections_of(backbone: Backbone) -> list[Projection]:
    """Returns the projections of all decoder layers."""
    layers = backbone.transformer_layers
    return [p for layer in layers for group in _groups_of(layer) for p in group]


def quantize_projections(
    backbone: Backbone,
    projections: Iterable[Projection],
    sequences: np.ndarray,
    rounding: WeightQuantizationConfig,
    config: Any,
) -> None:
    """Quantizes projections by GPTQ, for the inputs that those before give them.

    Holds the hidden states of all sequences, twice, and the Hessian of one input.

    Args:
        backbone: `OpenLlamaBackbone`.
        projections: Those of `projections_of(backbone)` to quantize.
        sequences: Token ids `(sequences, length)`.
        rounding: The format of the weights.
        config: `keras.quantizers.GPTQConfig`.

    Raises:
        ValueError: See `round_with_hessian`.
    """
    selected = {id(projection) for projection in projections}
    sizes = {id(p): p.matrix_shape for p in projections_of(backbone)}
    total = sum(4 * np.prod(sizes[key]) for key in selected)
    matrices = {}
    with _without_gradients(), progress_bar("Quantizing by GPTQ", int(total)) as bar:

        def quantize(group, inputs):
            group = [p for p in group if id(p) in selected]
            if group:
                hessian = _hessian(inputs)
                matrices.update(
                    {p: _round(p, hessian, rounding, config) for p in group}
                )
                bar.update(sum(4 * np.prod(p.matrix_shape) for p in group))

        hidden, rotation, mask = _embed(backbone, sequences)
        for layer in backbone.transformer_layers:
            _run_layer(layer, hidden, rotation, mask, quantize)
            # Until here the layer has float weights, so that JAX compiles each product
            # once for all layers.
            while matrices:
                projection, matrix = matrices.popitem()
                projection.quantize(config=rounding, matrix=matrix)


def _embed(backbone, sequences):
    """Returns the embeddings in batches, and the layers' rotation and mask."""
    count, length = sequences.shape
    step = max(1, _BATCH_TOKENS // length)
    starts = range(0, count, step)
    hidden = [backbone.token_embedding(sequences[i : i + step]) for i in starts]
    positions = ops.arange(length)[None]
    rotation = backbone.rotary_embedding(positions, ops.convert_to_tensor([length]))
    return hidden, rotation, causal_mask(positions)


def _groups_of(layer: DecoderLayer) -> list[list[Projection]]:
    """Returns the projections of a layer, those with the same input together."""
    attention, network = layer.self_attention, layer.feedforward
    return [
        [attention.query, attention.key, attention.value],
        [attention.output_projection],
        [network.gate, network.up],
        [network.down],
    ]


def _run_layer(
    layer: DecoderLayer,
    hidden: list[Tensor],
    rotation: tuple[Tensor, Tensor],
    mask: Tensor,
    quantize: Callable[[list[Projection], Iterator[Tensor]], None],
) -> None:
    """Quantizes the projections of a layer; replaces `hidden` by the layer's outputs.

    Each group of projections is quantized before it computes the inputs of the next.
    """
    attention, network = layer.self_attention, layer.feedforward
    heads, output, up, down = _groups_of(layer)
    normalize = layer.self_attention_norm
    quantize(heads, map(normalize, hidden))
    contexts = []
    for x in hidden:
        context = causal_attention(
            *attention.project_heads(normalize(x), *rotation), mask
        )
        contexts.append(attention.join_heads(context))
    quantize(output, iter(contexts))
    for i in range(len(hidden)):
        hidden[i] = hidden[i] + attention.output_projection(contexts.pop(0))
    normalize = layer.feedforward_norm
    quantize(up, map(normalize, hidden))
    quantize(
        down, (network.activate(*network.project_up(normalize(x))) for x in hidden)
    )
    for i, x in enumerate(hidden):
        hidden[i] = x + network(normalize(x))


def _hessian(inputs: Iterator[Tensor]) -> np.ndarray:
    """Returns `X.T @ X` of all tokens, float32 `(size, size)`."""
    total = 0
    for x in inputs:
        x = ops.cast(ops.reshape(x, (-1, x.shape[-1])), "float32")
        total = total + ops.matmul(ops.transpose(x), x)
    return as_numpy(total)


def _round(
    projection: Projection,
    hessian: np.ndarray,
    rounding: WeightQuantizationConfig,
    config: Any,
) -> QuantizedMatrix:
    """Rounds a kernel, and assigns what it stands for."""
    kernel = kernel_variable(projection)
    matrix = round_with_hessian(
        as_numpy(kernel.value),
        hessian,
        rounding.format_for(projection.quantization_role),
        damping=config.hessian_damping,
        activation_order=config.activation_order,
    )
    kernel.assign(matrix.dequantize())
    return matrix


def _without_gradients():
    if keras.config.backend() == "torch":
        return torch.no_grad()
    return contextlib.nullcontext()
