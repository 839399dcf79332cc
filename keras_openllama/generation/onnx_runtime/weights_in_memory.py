"""Moves weights to large blocks of memory, which processors read faster.

Weights of a mapped file, or in many small arrays, are in pages of 4 KB. NumPy asks
Linux for pages of 2 MB for a large array (`benchmarks/README.md`).
"""

from __future__ import annotations

import weakref
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
from keras_openllama.utils.host_memory import allocate_block, free_memory

if TYPE_CHECKING:
    from keras_openllama.backend.keras_hub import CausalLM

# Heuristics: the size of a block, which is freed when none of its weights is used, and
# the share of the free memory that all blocks may take.
_BLOCK = 256 << 20
_LARGEST_SHARE = 0.7
# The blocks that exist: what they hold is not moved again.
_blocks: list[weakref.ref[np.ndarray]] = []


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


def move_to_blocks(variables: Sequence[keras.Variable]) -> None:
    """Moves weights on a CPU to blocks of memory, those that are in none yet.

    It does nothing if the blocks would take most of the free memory, which then is the
    better use of it, and on TensorFlow, which cannot use memory of an array.

    Args:
        variables: the weights.
    """
    if keras.config.backend() == "tensorflow":
        return
    variables = [variable for variable in variables if not _is_in_a_block(variable)]
    total = sum(map(_size, variables))
    free = free_memory()
    if free is None or total > _LARGEST_SHARE * free:
        return
    group, size = [], 0
    for variable in variables:
        if group and size + _size(variable) > _BLOCK:
            _move(group)
            group, size = [], 0
        group.append(variable)
        size += _size(variable)
    if group:
        _move(group)


def _move(variables):
    parts = allocate_block([_size(variable) for variable in variables])
    for variable, part in zip(variables, parts, strict=True):
        old = stored_value(variable)
        array = part.view(variable.dtype).reshape(tuple(old.shape))
        array[...] = as_numpy(old)
        replace_value(variable, tensor_on_memory(array, old))
    _blocks[:] = [known for known in _blocks if known() is not None]
    _blocks.append(weakref.ref(parts[0].base))


def _size(variable):
    return as_numpy(stored_value(variable)).nbytes


def _is_in_a_block(variable):
    address = as_numpy(stored_value(variable)).ctypes.data
    blocks = [block for known in _blocks if (block := known()) is not None]
    return any(0 <= address - block.ctypes.data < block.nbytes for block in blocks)
