"""Moves quantized weights from memory to a file that is mapped into memory.

ONNX Runtime has a copy of the weights, in an order of its own. Those of the variables
are needed only until they are copied again, are saved, or the backend computes with
them. In a mapped file they take memory only then: the system frees it when memory is
short.
"""

from __future__ import annotations

import tempfile
from typing import TYPE_CHECKING

import keras
import numpy as np

from keras_openllama.backend.arrays import as_numpy, tensor_on_memory
from keras_openllama.backend.keras_private import (
    flatten_layers,
    replace_value,
    stored_value,
)
from keras_openllama.layers.quantizable import is_quantized
from keras_openllama.utils.mapping import large_files_directory, map_privately

if TYPE_CHECKING:
    from keras_openllama.backend.keras_hub import CausalLM

# Offsets of arrays in the file: JAX does not share memory of less alignment.
_ALIGNMENT = 64


def move_to_disk(model: CausalLM) -> None:
    """Moves the quantized weights of a model on a CPU to a temporary file.

    The file has no name, and is deleted when the last weight that it holds is replaced.
    Weights that are changed later are in memory again. On TensorFlow, which cannot use
    mapped memory for a variable, this does nothing.

    Args:
        model: `OpenLlamaCausalLM`.

    Raises:
        OSError: If there is no space for the file. The weights stay in memory.
    """
    variables = [
        variable
        for layer in flatten_layers(model)
        if is_quantized(layer)
        for variable in layer.quantized_variables()
    ]
    if not variables or keras.config.backend() == "tensorflow":
        return
    offsets = []
    with tempfile.TemporaryFile(dir=large_files_directory()) as file:
        for variable in variables:
            file.seek(-file.tell() % _ALIGNMENT, 1)
            offsets.append(file.tell())
            array = np.ascontiguousarray(as_numpy(stored_value(variable)))
            file.write(array.view("uint8").data)
        file.flush()
        memory = map_privately(file)
    for variable, offset in zip(variables, offsets, strict=True):
        old = stored_value(variable)
        array = np.ndarray(tuple(old.shape), variable.dtype, memory, offset)
        replace_value(variable, tensor_on_memory(array, old))
