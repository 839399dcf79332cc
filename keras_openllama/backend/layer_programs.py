"""Compiled functions of layers, one program for all layers that are alike.

`jit.compile_function` compiles a whole network. A program of one layer compiles in a
fraction of the time, and its parts can be combined at run time.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import keras
from keras import ops, tree

from keras_openllama.backend.jit import use_compilation_cache
from keras_openllama.backend.keras_private import flatten_layers

if keras.config.backend() == "jax":
    import jax
elif keras.config.backend() == "tensorflow":
    import tensorflow as tf


_OF_MODELS = weakref.WeakKeyDictionary()


def layer_programs(model: keras.Model) -> LayerPrograms:
    """Returns the programs of a model, the same object for the same model.

    Args:
        model: A Keras model.

    Example:
        >>> layer_programs(lm) is layer_programs(lm)
        True
    """
    if model not in _OF_MODELS:
        _OF_MODELS[model] = LayerPrograms()
    return _OF_MODELS[model]


class LayerPrograms:
    """Compiles functions of layers and tensors on first use (JAX and TensorFlow).

    The values of the variables are arguments of a program.

    Attributes:
        count: number of functions of layers and tensors that are compiled; on JAX each
            has one program for each combination of shapes.

    Example:
        >>> layers = [keras.layers.Dense(4) for _ in range(2)]
        >>> for layer in layers:
        ...     layer.build((None, 4))
        >>> programs = LayerPrograms()
        >>> def apply(layer, x):
        ...     return layer(x)
        >>> for layer in layers:
        ...     y = programs.run(apply, [layer], x=ops.ones((1, 4)))
        >>> programs.count
        1
    """

    def __init__(self) -> None:
        self._programs = {}
        self._signatures = {}
        if keras.config.backend() == "jax":
            use_compilation_cache()

    @property
    def count(self) -> int:
        """Number of compiled functions, without different shapes on JAX."""
        return len(self._programs)

    def refresh(self) -> None:
        """Adopts changes of the variables of layers, as by LoRA or quantization."""
        self._signatures.clear()

    def run(
        self,
        function: Callable[..., Any],
        layers: Sequence[keras.layers.Layer] = (),
        donate: Sequence[str] = (),
        **inputs: Any,
    ) -> Any:
        """Runs a function, which is compiled at its first call.

        Args:
            function: callable of the layers and, by name, of tensors.
            layers: built Keras layers.
            donate: names of inputs whose memory the result may reuse (JAX).
            **inputs: tensors or NumPy arrays, nested.

        Returns:
            What the function returns.
        """
        signatures, variables = [], []
        for layer in layers:
            if id(layer) not in self._signatures:
                self._signatures[id(layer)] = layer, _signature(layer), layer.variables
            _, signature, own = self._signatures[id(layer)]
            signatures.append(signature)
            variables.append(own)
        key = function, tuple(signatures)
        if keras.config.backend() == "tensorflow":
            values = [[ops.convert_to_tensor(v) for v in own] for own in variables]
            inputs = tree.map_structure(ops.convert_to_tensor, inputs)
            shapes = tuple((x.shape, x.dtype) for x in tree.flatten(inputs))
            key = *key, shapes
        else:
            values = [[v.value for v in own] for own in variables]
        if key not in self._programs:
            self._programs[key] = _Program(function, donate)
        return self._programs[key](layers, variables, values, inputs)


class _Program:
    """A compiled function of layers with the same signature."""

    def __init__(self, function, donate):
        def program(values, **inputs):
            # The layers and variables of this call. For other shapes the function is
            # traced again: variables of the first call may have been replaced since.
            layers, variables = self._call
            mapping = [
                pair
                for own, new in zip(variables, values, strict=True)
                for pair in zip(own, new, strict=True)
            ]
            with keras.StatelessScope(state_mapping=mapping):
                return function(*layers, **inputs)

        # For logs and profiles.
        program.__name__ = getattr(function, "__name__", type(function).__name__)
        self._compiled = _compile(program, donate)
        self._call = (), ()  # One attribute, since threads share the program.

    def __call__(self, layers, variables, values, inputs):
        self._call = layers, variables
        return self._compiled(values, **inputs)


def _compile(program, donate):
    if keras.config.backend() == "jax":
        return jax.jit(program, donate_argnames=donate)
    return tf.function(program, jit_compile=True)


def _signature(layer):
    """Equal for layers with the same computation, but for the variables' values."""
    parts = [layer, *flatten_layers(layer)]
    adapters = [
        (getattr(part, "lora_alpha", None), getattr(part, "lora_rank", None))
        for part in parts
    ]
    shapes = [(tuple(v.shape), str(v.dtype)) for v in layer.variables]
    kinds = tuple(map(type, parts))
    if any(part.quantization_mode is not None for part in parts):
        kinds = id(layer)  # It has settings that are not among these.
    return kinds, tuple(adapters), tuple(shapes)
