"""LoRA adapters: put into the weights, and taken out again."""

import dataclasses

import keras
import numpy as np

from keras_openllama.host_arrays import as_numpy


def adapted_layers(model):
    """The projections of a model that have adapters, in its order."""
    return [
        layer
        for layer in model._flatten_layers()
        if getattr(layer, "lora_enabled", False)
    ]


@dataclasses.dataclass(frozen=True)
class Merged:
    """A projection whose adapters were merged.

    Attributes:
        layer: `Projection`.
        kernel: NumPy array, what its kernel was before.
        removed: what `Projection.put_adapters` takes.
    """

    layer: keras.layers.Layer
    kernel: np.ndarray
    removed: tuple


def merged_kernel(layer):
    """The kernel with the adapters in it: float32 NumPy array."""
    first, second = (as_numpy(v.value) for v in layer.adapters().values())
    scale = layer.lora_alpha / layer.lora_rank
    return as_numpy(layer._kernel.value).astype("float32") + scale * (first @ second)


def merge(backbone, reversible):
    """See `OpenLlamaBackbone.merge_lora`.

    Returns:
        Tuple of `Merged`, empty if not `reversible`.
    """
    layers = adapted_layers(backbone)
    if not layers:
        raise ValueError("There are no adapters to merge. See `enable_lora`.")
    quantized = {layer.quantization_mode for layer in layers} - {None}
    if quantized:
        raise ValueError(
            f"Adapters cannot be merged into weights that are quantized ({quantized}). "
            "Save them with `save_adapters`, and merge them into a model in floating "
            "point."
        )
    merged = []
    for layer in layers:
        # A copy: on a CPU the array may be the variable's own memory.
        kernel = np.array(as_numpy(layer._kernel.value)) if reversible else None
        layer._kernel.assign(merged_kernel(layer).astype(layer._kernel.dtype))
        merged.append(Merged(layer, kernel, layer.remove_adapters()))
        layer._kernel.trainable = True  # `enable_lora` froze it by itself.
    return tuple(merged) if reversible else ()


def _check_unchanged(entry):
    """Raises a `ValueError` if a kernel is not what `merge` has made of it."""
    layer, (variables, rank, alpha) = entry.layer, entry.removed
    first, second = (as_numpy(v.value) for v in variables.values())
    merged = entry.kernel.astype("float32") + alpha / rank * (first @ second)
    if (
        layer.quantization_mode is not None
        or (as_numpy(layer._kernel.value) != merged.astype(layer._kernel.dtype)).any()
    ):
        raise ValueError(
            f"{layer.path} was trained or quantized since adapters were merged into "
            "it, so they cannot be taken out again."
        )


def unmerge(backbone, merged):
    """See `OpenLlamaBackbone.unmerge_lora`."""
    for entry in merged:
        _check_unchanged(entry)
    for layer in backbone._flatten_layers(include_self=False):
        layer.trainable = False
    for entry in merged:
        entry.layer.trainable = True
        entry.layer._kernel.assign(entry.kernel)
        entry.layer._kernel.trainable = False
        entry.layer.put_adapters(entry.removed)
