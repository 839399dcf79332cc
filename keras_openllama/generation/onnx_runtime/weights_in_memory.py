"""Moves weights to one block of memory, which processors read faster.

Weights of a mapped file, or in many small blocks, are in pages of 4 KB. NumPy asks
Linux for pages of 2 MB for a large block: a step of one row then takes about two thirds
of the time (`benchmarks/README.md`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import keras
import numpy as np

from keras_openllama.backend.arrays import as_numpy, tensor_on_memory
from keras_openllama.backend.keras_private import (
    flatten_layers,
    kernel_variable,
    replace_value,
    stored_value,
)
from keras_openllama.layers.projection import Projection
from keras_openllama.layers.quantizable import is_quantized
from keras_openllama.utils.host_memory import free_memory

if TYPE_CHECKING:
    from keras_openllama.backend.keras_hub import CausalLM

# Offsets of arrays in the block: JAX does not share memory of less alignment.
_ALIGNMENT = 64
# Heuristic: the share of the free memory that the block may take.
_LARGEST_SHARE = 0.7


def float_matrices(model: CausalLM) -> list[keras.Variable]:
    """Returns the kernels in bfloat16 of a model's projections, without adapters.

    Args:
        model: `OpenLlamaCausalLM`.
    """
    variables = [
        kernel_variable(layer)
        for layer in flatten_layers(model)
        if isinstance(layer, Projection) and not is_quantized(layer)
    ]
    return [variable for variable in variables if variable.dtype == "bfloat16"]


def move_to_one_block(variables: Sequence[keras.Variable]) -> None:
    """Moves weights on a CPU to one block of memory, one after the other.

    It does nothing if the block would take most of the free memory, which then is the
    better use of it.

    Args:
        variables: the weights, on JAX or PyTorch.
    """
    sizes = [as_numpy(stored_value(variable)).nbytes for variable in variables]
    total = sum(size + -size % _ALIGNMENT for size in sizes)
    free = free_memory()
    if free is None or total > _LARGEST_SHARE * free:
        return
    block = np.empty(total + _ALIGNMENT, "uint8")
    start = -block.ctypes.data % _ALIGNMENT
    for variable, size in zip(variables, sizes, strict=True):
        old = stored_value(variable)
        array = np.ndarray(tuple(old.shape), variable.dtype, block, start)
        array[...] = as_numpy(old)
        replace_value(variable, tensor_on_memory(array, old))
        start += size + -size % _ALIGNMENT
