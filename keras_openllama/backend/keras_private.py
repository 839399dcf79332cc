"""The only use of names that Keras does not export.

Each function says which name of Keras it stands on, and `tests/backend` has a test for
each, so that after an upgrade of Keras the failing test says what has changed. The
unexported names of KerasHub are in `backend.keras_hub`.
"""

import contextlib

from keras.src.backend.common import global_state
from keras.src.backend.common.stateless_scope import in_stateless_scope
from keras.src.saving.saving_lib import H5IOStore
from keras.src.saving.saving_lib import _save_state as _keras_save_state
from keras.src.utils import module_utils

__all__ = [
    "H5IOStore",
    "adam_moments",
    "collect_uninitialized_variables",
    "compiled_metrics",
    "disable_autocast",
    "embeddings_variable",
    "flatten_layers",
    "in_stateless_scope",
    "initialize_deferred",
    "initialize_with",
    "kernel_variable",
    "loss_tracker",
    "optimized_variables",
    "preserve_tensorflow_availability",
    "register_torch_parameters",
    "save_state",
    "set_variable_layout",
    "stored_value",
    "torch_device",
    "torch_dtype",
    "track_variables",
    "uninitialized_variables",
    "untrack_variables",
    "variable_layout",
]

_UNINITIALIZED = "uninitialized_variables"


# ----- Layers


def flatten_layers(layer, include_self=True):
    """The layers inside a layer or model, recursively: `Layer._flatten_layers`.

    Args:
        layer: `keras.layers.Layer`, a model too.
        include_self: bool, whether the layer itself comes first.

    Returns:
        Iterator of layers.
    """
    return layer._flatten_layers(include_self=include_self)


def kernel_variable(layer):
    """The kernel as it is stored, without adapters: `EinsumDense._kernel`.

    The exported `layer.kernel` adds the adapters of LoRA and casts the sum.
    """
    return layer._kernel


def embeddings_variable(layer):
    """The table as it is stored, without adapters: `Embedding._embeddings`."""
    return layer._embeddings


def track_variables(layer, variables):
    """Adds variables to those of a built layer: `Layer._tracker`, `_track_variable`."""
    layer._tracker.unlock()
    for variable in variables:
        layer._track_variable(variable)
    layer._tracker.lock()


def untrack_variables(layer, variables):
    """Removes variables from those of a built layer: `Layer._untrack_variable`."""
    for variable in variables:
        layer._untrack_variable(variable)


def register_torch_parameters(model):
    """Makes the variables of layers parameters of PyTorch: `Layer._track_variables`.

    Keras does so when a layer is built, except in a stateless scope. PyTorch only.
    """
    for layer in flatten_layers(model):
        layer._track_variables()


# ----- Variables


def variable_layout(variable):
    """The sharding that a variable was given, or `None`: `Variable._layout`.

    Returns:
        `keras.distribution.TensorLayout`, `jax.sharding.Sharding` or `None`.
    """
    return variable._layout


def set_variable_layout(variable, layout):
    """Sets the sharding of a variable that has no value yet: `Variable._layout`."""
    variable._layout = layout


def stored_value(variable):
    """The tensor that a variable holds, or `None`: `Variable._value`.

    The exported `value` initializes an empty variable, casts in an autocast scope, and
    returns another tensor in a stateless scope.
    """
    return variable._value


def disable_autocast(variable):
    """Keeps the dtype of a variable under a mixed policy: `Variable._autocast`."""
    variable._autocast = False


def initialize_with(variable, value):
    """Gives an empty variable its first value, without a copy.

    Stands on `Variable._initialize`, and on `_initializer`, which must not run later.

    Args:
        variable: `keras.Variable` without a value.
        value: tensor of the backend, of the variable's shape and dtype.
    """
    variable._initialize(value)
    variable._initializer = None


def initialize_deferred(variable):
    """Runs the initializer of an empty variable: `Variable._deferred_initialize`."""
    variable._deferred_initialize()


def uninitialized_variables():
    """The variables that Keras is to initialize later, after a stateless scope.

    Stands on the global attribute `uninitialized_variables` of
    `keras.src.backend.common.global_state`.
    """
    return list(global_state.get_global_attribute(_UNINITIALIZED) or [])


@contextlib.contextmanager
def collect_uninitialized_variables():
    """Collects variables that are made in a block but not initialized.

    Keras's list of them, see `uninitialized_variables`, is restored after the block,
    also where the block fails: Keras neither initializes these variables later nor
    keeps an abandoned model alive.

    Yields:
        A list that has, after the block, the variables that were made in it.
    """
    pending = global_state.get_global_attribute(_UNINITIALIZED) or []
    made = []
    global_state.set_global_attribute(_UNINITIALIZED, [])
    try:
        yield made
        made.extend(global_state.get_global_attribute(_UNINITIALIZED))
    finally:
        global_state.set_global_attribute(_UNINITIALIZED, pending)


# ----- Training


def loss_tracker(model):
    """The `keras.metrics.Mean` of a compiled model's loss: `Trainer._loss_tracker`."""
    return model._loss_tracker


def compiled_metrics(model):
    """The metrics that `compile` was given, flat: `Trainer._compile_metrics`."""
    return model._compile_metrics.metrics


def optimized_variables(optimizer):
    """The variables that an optimizer was built for: `Optimizer._trainable_variables`.

    Returns:
        List of `keras.Variable`, empty if it is not built.
    """
    return optimizer._trainable_variables or []


def adam_moments(optimizer, variable):
    """What Adam keeps of a variable's gradients.

    Stands on `Optimizer._get_variable_index` and on `_momentums`, `_velocities` and
    `_velocity_hats` of `keras.optimizers.Adam`.

    Returns:
        Three `keras.Variable`s: the first moment, the second, and the largest second
        moment, which is `None` without `amsgrad`.
    """
    index = optimizer._get_variable_index(variable)
    largest = optimizer._velocity_hats[index] if optimizer.amsgrad else None
    return optimizer._momentums[index], optimizer._velocities[index], largest


# ----- Saving


def save_state(saveable, store, skipped=()):
    """Passes all variables of a model to a store: `saving_lib._save_state`.

    Args:
        saveable: `keras.Model`.
        store: instance of a subclass of `H5IOStore`.
        skipped: layers that are left out.
    """
    _keras_save_state(saveable, store, None, "", {id(layer) for layer in skipped})


# ----- Backends


def torch_device():
    """The device that Keras puts tensors of PyTorch on: `torch.core.get_device`."""
    from keras.src.backend.torch.core import get_device

    return get_device()


def torch_dtype(dtype):
    """PyTorch's dtype for a name of Keras: `torch.core.to_torch_dtype`."""
    from keras.src.backend.torch.core import to_torch_dtype

    return to_torch_dtype(dtype)


@contextlib.contextmanager
def preserve_tensorflow_availability():
    """Makes Keras forget whether TensorFlow could be imported inside the block.

    Stands on `keras.src.utils.module_utils.tensorflow._available`, which keeps the
    answer of the first attempt.
    """
    known = module_utils.tensorflow._available
    try:
        yield
    finally:
        module_utils.tensorflow._available = known
