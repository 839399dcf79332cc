"""Assigns the weights of a checkpoint to a model that was built without weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from keras_openllama.backend.keras_private import flatten_layers
from keras_openllama.checkpoints.matching import format_names
from keras_openllama.checkpoints.tensors import ReadAhead, in_file_order
from keras_openllama.layers.quantizable import QuantizableLayer, is_quantized
from keras_openllama.loading.casting import (
    can_map_weights,
    can_share_memory,
    shared_value,
    value_for,
)
from keras_openllama.loading.uninitialized import assign_value, finish_loading
from keras_openllama.quantization.policies import matrix_format, policy_of
from keras_openllama.utils.progress import progress_bar

if TYPE_CHECKING:
    import keras

    from keras_openllama.checkpoints.tensors import StoredTensor


class CheckpointWeights:
    """The weights of a checkpoint, which are loaded into one model.

    Use it as a context manager and build the model inside the block: the first weights
    are read from the disk in the meantime.

    Args:
        tensors: The tensors by variable path.
        dtype: Dtype of the weights of the model. Tensors of this dtype are mapped, not
            read, where that is possible. `None` reads all, to quantize them.

    Example:
        tensors = transformers.read_tensors(LocalRepository(path), arguments)
        with CheckpointWeights(tensors) as weights:
            with without_weights() as variables:
                model = OpenLlamaCausalLM(OpenLlamaBackbone(**arguments))
            weights.assign_to(model, variables)
    """

    def __init__(
        self, tensors: Mapping[str, StoredTensor], dtype: str | None = None
    ) -> None:
        self._tensors = tensors
        # If head and embedding are tied, one tensor is the value of two weights.
        unique = {id(stored): stored for stored in tensors.values()}
        maps = dtype is not None and can_map_weights()
        self._mapped, read = [], []
        for stored in in_file_order(unique.values()):
            is_mapped = maps and can_share_memory(stored, dtype)
            (self._mapped if is_mapped else read).append(stored)
        self._ahead = ReadAhead(read)
        self._bytes = sum(stored.nbytes for stored in read)

    def __enter__(self) -> CheckpointWeights:
        self._ahead.__enter__()
        return self

    def __exit__(self, *error: Any):
        self._ahead.__exit__(*error)

    def assign_to(self, model: keras.Model, variables: list[keras.Variable]) -> None:
        """Assigns each tensor to its variable, one at a time.

        At most one tensor is in memory in addition to the model's weights. Those that
        are mapped are read when they are used.

        Args:
            model: `OpenLlamaBackbone` or `OpenLlamaCausalLM`.
            variables: The list that `without_weights` yielded.

        Raises:
            ValueError: If model and checkpoint have different weights, or a value
                exceeds the range of the variable's dtype.
        """
        quantized = {
            layer.quantized_variables()[0].path: layer
            for layer in flatten_layers(model)
            if is_quantized(layer)
        }
        scales = {
            id(v) for la in quantized.values() for v in la.quantized_variables()[1:]
        }
        own = {w.path: w for w in model.weights if id(w) not in scales}
        unnamed = set(own) ^ set(self._tensors)
        if unnamed:
            raise ValueError(
                "Weights can be loaded only into a model without adapters. These do "
                f"not match: {format_names(unnamed)}. Load the model first, and call "
                "`enable_lora` afterwards."
            )
        targets = {}
        for path, stored in self._tensors.items():
            target = quantized.get(path, own[path])
            targets.setdefault(id(stored), []).append(target)
        for stored in self._mapped:
            first, *others = targets[id(stored)]
            if first.dtype == stored.dtype:
                assign_value(first, shared_value(stored))
            else:  # Norms have another dtype than the matrices.
                others.append(first)
            for target in others:  # Tied weights need memory of their own.
                _assign(target, stored)
        with progress_bar("Loading weights", self._bytes) as bar:
            for stored in self._ahead:
                for target in targets[id(stored)]:
                    _assign(target, stored)
                stored.release()
                bar.update(stored.nbytes)
        finish_loading(model, variables)


def _assign(target, stored):
    """Assigns a tensor to a variable, or quantizes it for a layer."""
    try:
        if not isinstance(target, QuantizableLayer):
            assign_value(target, value_for(target, stored.array()))
            return
        matrix = _quantized(target, stored)
    except ValueError as error:
        raise ValueError(f"{stored.name} in {stored.file.path}: {error}.") from error
    arrays = (matrix.values, matrix.scales, matrix.zeros)
    for variable, array in zip(target.quantized_variables(), arrays, strict=False):
        assign_value(variable, value_for(variable, array))


def _quantized(layer, stored):
    """Returns a tensor as it is quantized in the file, or quantizes its weights."""
    chosen = matrix_format(policy_of(layer))
    if chosen == getattr(stored, "format", None):
        return stored.quantized_matrix()
    return layer.round_matrix(stored.array())
