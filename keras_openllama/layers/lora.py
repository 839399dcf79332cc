"""Merges LoRA adapters into the kernels, and unmerges them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import keras
import numpy as np

from keras_openllama.backend.arrays import as_numpy
from keras_openllama.backend.keras_private import flatten_layers, kernel_variable
from keras_openllama.config import PROJECTIONS
from keras_openllama.layers.adapter_merging import add_product
from keras_openllama.layers.projection import Adapters, Projection


def adapted_layers(model: keras.layers.Layer) -> list[Projection]:
    """Returns the projections of a model that have adapters, in the model's order.

    Example:
        >>> adapted_layers(lm)
        []
    """
    return [
        layer
        for layer in flatten_layers(model)
        if getattr(layer, "lora_enabled", False)
    ]


def adapter_arguments(model: keras.layers.Layer) -> dict[str, Any] | None:
    """Returns the arguments of `enable_lora` that give a model its adapters.

    Args:
        model: A model or layer.

    Returns:
        The arguments by name. `None` if there are no adapters, or those of its layers
        differ in rank or alpha.

    Example:
        >>> backbone = lm.backbone.from_config(lm.backbone.get_config())
        >>> backbone.enable_lora(4, ["key"])
        >>> adapter_arguments(backbone)
        {'rank': 4, 'target_layer_names': ['key'], 'alpha': 4}
    """
    settings = {(la.lora_rank, la.lora_alpha) for la in adapted_layers(model)}
    if len(settings) != 1:
        return None
    ((rank, alpha),) = settings
    names = {layer.name for layer in adapted_layers(model)}
    targets = [name for name in PROJECTIONS if name in names]
    return {"rank": rank, "target_layer_names": targets, "alpha": alpha}


@dataclasses.dataclass(frozen=True)
class MergedProjection:
    """A projection whose adapters were merged.

    Attributes:
        layer: The projection.
        kernel: Its kernel before the merge.
        adapters: The argument of `Projection.restore_adapters`.
    """

    layer: Projection
    kernel: np.ndarray
    adapters: Adapters


def merge_adapters(
    backbone: keras.layers.Layer, reversible: bool
) -> tuple[MergedProjection, ...]:
    """Merges all adapters, see `OpenLlamaBackbone.merge_lora`.

    Args:
        backbone: `OpenLlamaBackbone` with adapters.
        reversible: Whether to copy the kernels, for `unmerge_adapters`.

    Returns:
        The merged projections; empty if not `reversible`.

    Raises:
        ValueError: If there are no adapters, or the kernels are quantized.
    """
    layers = adapted_layers(backbone)
    if not layers:
        raise ValueError(
            "There are no adapters to merge. Add some with `enable_lora`, or load them "
            "with `load_adapters`."
        )
    quantized = {layer.quantization_mode for layer in layers} - {None}
    if quantized:
        raise ValueError(
            f"Adapters cannot be merged into weights that are quantized ({quantized}). "
            "Save them with `save_adapters`, and merge them into a floating-point "
            "model."
        )
    merged = []
    for layer in layers:
        # A copy: on a CPU the array may share the memory of the variable.
        kernel = kernel_variable(layer)
        original = np.array(as_numpy(kernel.value)) if reversible else None
        kernel.assign(layer.merged_kernel().astype(kernel.dtype))
        merged.append(MergedProjection(layer, original, layer.remove_adapters()))
        kernel.trainable = True  # `Projection.enable_lora` froze it.
    return tuple(merged) if reversible else ()


def _check_unchanged(entry):
    """Raises a `ValueError` if a kernel has changed since `merge_adapters`."""
    layer = entry.layer
    variables, rank, alpha = entry.adapters
    factors = (as_numpy(variable.value) for variable in variables.values())
    merged = add_product(entry.kernel, *factors, alpha / rank)
    merged = merged.astype(entry.kernel.dtype)
    current = as_numpy(kernel_variable(layer).value)
    if layer.quantization_mode is not None or (current != merged).any():
        raise ValueError(
            f"{layer.path} was trained or quantized since adapters were merged into "
            "it, so they cannot be unmerged."
        )


def unmerge_adapters(
    backbone: keras.layers.Layer, merged: Iterable[MergedProjection]
) -> None:
    """Restores kernels and adapters, see `OpenLlamaBackbone.unmerge_lora`.

    Args:
        backbone: The backbone given to `merge_adapters`.
        merged: What `merge_adapters` returned.

    Raises:
        ValueError: If a kernel was trained or quantized since the merge.
    """
    for entry in merged:
        _check_unchanged(entry)
    # As after `enable_lora`: everything is frozen except the adapters.
    for layer in flatten_layers(backbone, include_self=False):
        layer.trainable = False
    for entry in merged:
        entry.layer.trainable = True
        kernel = kernel_variable(entry.layer)
        kernel.assign(entry.kernel)
        kernel.trainable = False
        entry.layer.restore_adapters(entry.adapters)
