"""Whether the weights of a model have changed since copies of them were made."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import keras
import numpy as np

from keras_openllama.backend.keras_private import stored_value

if TYPE_CHECKING:
    from keras_openllama.backend.keras_hub import CausalLM

# Values of each weight that are compared on TensorFlow.
_SAMPLES = 256


class WeightsState:
    """Tells whether weights have been replaced or assigned.

    JAX replaces arrays, and PyTorch counts the changes of a tensor. TensorFlow does
    neither, so some values of each weight are compared.

    Args:
        model: `OpenLlamaCausalLM`.

    Example:
        >>> state = WeightsState(lm)
        >>> state.update(), state.update()
        (True, False)
    """

    def __init__(self, model: CausalLM) -> None:
        self._model = model
        self._states = []

    def update(self) -> bool:
        """Returns whether a weight has changed since the last call; first True."""
        previous = self._states
        self._states = [_state(weight) for weight in self._model.weights]
        return len(previous) != len(self._states) or not all(
            _is_same(*pair) for pair in zip(previous, self._states, strict=True)
        )


def _state(weight: keras.Variable) -> tuple[Any, Any]:
    """The identity of a weight, and what changes with its value."""
    value = stored_value(weight)
    backend = keras.config.backend()
    if backend == "jax":
        return id(weight), weakref.ref(value)
    if backend == "torch":
        return id(weight), (value.data_ptr(), value._version)
    values = np.asarray(value).reshape(-1)
    step = max(1, values.size // _SAMPLES)
    return id(weight), values[::step].tobytes()


def _is_same(previous: tuple[Any, Any], current: tuple[Any, Any]) -> bool:
    if previous[0] != current[0]:
        return False
    if isinstance(current[1], weakref.ref):
        return previous[1]() is current[1]()
    return previous[1] == current[1]
