"""Models that are built without weights, and then given each weight once.

A model that is built as usual allocates its variables and fills them with random
numbers, only for a checkpoint to replace them: twice the memory, and minutes of random
numbers for the large ones. Here variables stay empty until their value comes.
"""

import contextlib

import keras

from keras_openllama.backend import keras_private


@contextlib.contextmanager
def without_weights():
    """Inside the block, models are built but their variables hold no value.

    Yields:
        A list that has, after the block, the variables that were made in it. Give each
        weight its value with `fill`, then call `finish`.

    Raises:
        RuntimeError: inside a `keras.StatelessScope`, where variables cannot be made.

    Example:

    ```python
    with without_weights() as variables:
        backbone = OpenLlamaBackbone(**config)
    backbone.count_params()
    ```
    """
    if keras_private.in_stateless_scope():
        raise RuntimeError("A model cannot be loaded inside a keras.StatelessScope.")
    with keras_private.collect_uninitialized_variables() as made:
        with keras.StatelessScope(initialize_variables=False):
            yield made


def layout_of(variable):
    """The sharding that `keras.distribution` has for a variable, or `None`.

    Returns:
        A `jax.sharding.Sharding`, or `None` outside a distribution.
    """
    distribution = keras.distribution.distribution()
    if distribution is None or keras.config.backend() != "jax":
        return None
    layout = keras_private.variable_layout(variable)
    layout = layout or distribution.get_variable_layout(variable)
    return getattr(layout, "backend_layout", layout)


def fill(variable, value):
    """Gives an empty variable its value, which it keeps without a copy.

    Args:
        variable: a `keras.Variable` made inside `without_weights`.
        value: tensor of the backend, of the variable's shape and dtype, on its device,
            and sharded as `layout_of(variable)`.

    Raises:
        ValueError: if the variable has a value already, or the shapes differ.
    """
    if keras_private.stored_value(variable) is not None:
        raise ValueError(f"{variable.path} has its value already.")
    if tuple(value.shape) != tuple(variable.shape):
        raise ValueError(
            f"{variable.path} has shape {tuple(variable.shape)}. Received a value of "
            f"shape {tuple(value.shape)}."
        )
    if keras.config.backend() == "torch":
        import torch

        value = torch.nn.Parameter(value, requires_grad=variable.trainable)
    keras_private.initialize_with(variable, value)


def finish(model, variables):
    """Ends the loading of a model: what is not a weight is initialised as usual.

    Args:
        model: the `keras.Model` that was built inside `without_weights`.
        variables: the list that `without_weights` yielded.

    Raises:
        RuntimeError: if a weight of the model has been given no value.
    """
    empty = [v for v in variables if keras_private.stored_value(v) is None]
    weights = {id(weight) for weight in model.weights}
    forgotten = [variable.path for variable in empty if id(variable) in weights]
    if forgotten:
        raise RuntimeError(f"Weights that were given no value: {', '.join(forgotten)}")
    for variable in empty:  # States of random generators.
        keras_private.initialize_deferred(variable)
    if keras.config.backend() == "torch":
        # Layers register their variables as torch parameters when they are built,
        # except in a stateless scope.
        keras_private.register_torch_parameters(model)
