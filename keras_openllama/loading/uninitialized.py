"""Builds models without weights, so that each weight is allocated once.

The constructor of a model usually allocates the variables and initializes them at
random, before a checkpoint replaces the values. That takes twice the memory, and for
large models minutes. Here variables have no value until it is loaded.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import keras

from keras_openllama.backend import keras_private
from keras_openllama.utils.types import Tensor


@contextlib.contextmanager
def without_weights() -> Iterator[list[keras.Variable]]:
    """Creates variables without values inside the block.

    Yields:
        A list. After the block it contains the variables that were created inside it.
        Assign a value to each with `assign_value`, then call `finish_loading`.

    Raises:
        RuntimeError: Inside a `keras.StatelessScope`, where variables cannot be
            created.

    Example:
        >>> with without_weights() as variables:
        ...     dense = keras.layers.Dense(1000)
        ...     dense.build((None, 1000))
        >>> [variable.shape for variable in variables]
        [(1000, 1000), (1000,)]
    """
    if keras_private.in_stateless_scope():
        raise RuntimeError("A model cannot be loaded inside a keras.StatelessScope.")
    with keras_private.collect_uninitialized_variables() as made:
        with keras.StatelessScope(initialize_variables=False):
            yield made


def layout_of(variable: keras.Variable) -> Any:
    """Returns the sharding that `keras.distribution` assigns to a variable.

    Args:
        variable: The variable. It does not need to have a value.

    Returns:
        A `jax.sharding.Sharding`. `None` without a distribution, and on backends other
        than JAX.
    """
    distribution = keras.distribution.distribution()
    if distribution is None or keras.config.backend() != "jax":
        return None
    layout = keras_private.variable_layout(variable)
    layout = layout or distribution.get_variable_layout(variable)
    return getattr(layout, "backend_layout", layout)


def assign_value(variable: keras.Variable, value: Tensor) -> None:
    """Assigns its value to a variable that has none, without a copy.

    Args:
        variable: Variable that was created inside `without_weights`.
        value: Tensor of the backend with the variable's shape and dtype, on its device,
            with the sharding `layout_of(variable)`.

    Raises:
        ValueError: If the variable has a value already, or the shapes differ.

    Example:
        >>> with without_weights() as variables:
        ...     variable = keras.Variable("zeros", shape=(2,))
        >>> assign_value(variable, keras.ops.ones((2,)))
        >>> variable.numpy().tolist()
        [1.0, 1.0]
    """
    if keras_private.stored_value(variable) is not None:
        raise ValueError(f"{variable.path} already has a value.")
    if tuple(value.shape) != tuple(variable.shape):
        raise ValueError(
            f"{variable.path} has shape {tuple(variable.shape)}. Received: a value of "
            f"shape {tuple(value.shape)}."
        )
    if keras.config.backend() == "torch":
        import torch

        value = torch.nn.Parameter(value, requires_grad=variable.trainable)
    keras_private.initialize_with(variable, value)


def finish_loading(model: keras.Model, variables: list[keras.Variable]) -> None:
    """Initializes the remaining variables, which are not weights, as usual.

    Args:
        model: The model that was built inside `without_weights`.
        variables: The list that `without_weights` yielded.

    Raises:
        RuntimeError: If a weight of the model has no value.
    """
    empty = [v for v in variables if keras_private.stored_value(v) is None]
    weights = {id(weight) for weight in model.weights}
    missing = [variable.path for variable in empty if id(variable) in weights]
    if missing:
        raise RuntimeError(f"No value was assigned to weights: {', '.join(missing)}")
    for variable in empty:  # States of random number generators.
        keras_private.initialize_deferred(variable)
    if keras.config.backend() == "torch":
        # A layer registers its variables as torch parameters when it is built, except
        # in a stateless scope.
        keras_private.register_torch_parameters(model)
