"""LoRA adapters: put into the weights, and taken out again."""

import dataclasses

import keras
import numpy as np

from keras_openllama.backend.arrays import as_numpy
from keras_openllama.backend.keras_private import flatten_layers, kernel_variable


def adapted_layers(model):
    """The projections of a model that have adapters, in its order."""
    return [
        layer
        for layer in flatten_layers(model)
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
    own = layer.adapters(), layer.lora_rank, layer.lora_alpha
    return _with_adapters(as_numpy(kernel_variable(layer).value), own)


def _with_adapters(kernel, adapters):
    """The same of a kernel and adapters as `Projection.remove_adapters` gives them."""
    variables, rank, alpha = adapters
    first, second = (as_numpy(variable.value) for variable in variables.values())
    return kernel.astype("float32") + alpha / rank * (first @ second)


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
        kernel = kernel_variable(layer)
        before = np.array(as_numpy(kernel.value)) if reversible else None
        kernel.assign(merged_kernel(layer).astype(kernel.dtype))
        merged.append(Merged(layer, before, layer.remove_adapters()))
        kernel.trainable = True  # `enable_lora` froze it by itself.
    return tuple(merged) if reversible else ()


def _check_unchanged(entry):
    """Raises a `ValueError` if a kernel is not what `merge` has made of it."""
    layer = entry.layer
    merged = _with_adapters(entry.kernel, entry.removed).astype(entry.kernel.dtype)
    now = as_numpy(kernel_variable(layer).value)
    if layer.quantization_mode is not None or (now != merged).any():
        raise ValueError(
            f"{layer.path} was trained or quantized since adapters were merged into "
            "it, so they cannot be taken out again."
        )


def unmerge(backbone, merged):
    """See `OpenLlamaBackbone.unmerge_lora`."""
    for entry in merged:
        _check_unchanged(entry)
    for layer in flatten_layers(backbone, include_self=False):
        layer.trainable = False
    for entry in merged:
        entry.layer.trainable = True
        kernel = kernel_variable(entry.layer)
        kernel.assign(entry.kernel)
        kernel.trainable = False
        entry.layer.put_adapters(entry.removed)
