"""Assigns the weights of a checkpoint to a model that was built without weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from keras_openllama.checkpoints.matching import format_names
from keras_openllama.checkpoints.tensors import ReadAhead, in_file_order
from keras_openllama.loading.casting import value_for
from keras_openllama.loading.uninitialized import assign_value, finish_loading
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

    Example:
        tensors = transformers.read_tensors(LocalRepository(path), arguments)
        with CheckpointWeights(tensors) as weights:
            with without_weights() as variables:
                model = OpenLlamaCausalLM(OpenLlamaBackbone(**arguments))
            weights.assign_to(model, variables)
    """

    def __init__(self, tensors: Mapping[str, StoredTensor]):
        self._tensors = tensors
        # If head and embedding are tied, one tensor is the value of two weights.
        unique = {id(stored): stored for stored in tensors.values()}
        self._ahead = ReadAhead(in_file_order(unique.values()))
        self._bytes = sum(stored.nbytes for stored in unique.values())

    def __enter__(self) -> CheckpointWeights:
        self._ahead.__enter__()
        return self

    def __exit__(self, *error: Any):
        self._ahead.__exit__(*error)

    def assign_to(self, model: keras.Model, variables: list[keras.Variable]) -> None:
        """Assigns each tensor to its variable, one at a time.

        At most one tensor is in memory in addition to the model's weights.

        Args:
            model: `OpenLlamaBackbone` or `OpenLlamaCausalLM`.
            variables: The list that `without_weights` yielded.

        Raises:
            ValueError: If model and checkpoint have different weights, or a value
                exceeds the range of the variable's dtype.
        """
        own = {weight.path: weight for weight in model.weights}
        unnamed = set(own) ^ set(self._tensors)
        if unnamed:
            raise ValueError(
                "Weights can be loaded only into a floating-point model without "
                f"adapters. These do not match: {format_names(unnamed)}. Load the "
                "model first, and call `enable_lora` or `quantize` afterwards."
            )
        targets = {}
        for path, stored in self._tensors.items():
            targets.setdefault(id(stored), []).append(own[path])
        with progress_bar("Loading weights", self._bytes) as bar:
            for stored in self._ahead:
                for variable in targets[id(stored)]:
                    assign_value(variable, _value(variable, stored))
                stored.release()
                bar.update(stored.nbytes)
        finish_loading(model, variables)


def _value(variable, stored):
    try:
        return value_for(variable, stored.array())
    except ValueError as error:
        raise ValueError(f"{stored.name} in {stored.file.path}: {error}.") from error
