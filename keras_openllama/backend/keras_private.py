"""The only use of names that Keras does not export.

Each function names the unexported name of Keras that it uses, and has a test in
`tests/backend`. So after an upgrade of Keras, the failing tests show what has changed.
The unexported names of KerasHub are in `backend.keras_hub`.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import keras
from keras.src.backend.common import global_state
from keras.src.backend.common.stateless_scope import in_stateless_scope
from keras.src.quantizers.utils import should_quantize_layer
from keras.src.saving.saving_lib import H5IOStore
from keras.src.saving.saving_lib import _save_state as _keras_save_state
from keras.src.utils import module_utils

from keras_openllama.backend.quiet import quiet_tensorflow_import
from keras_openllama.utils.types import Tensor

if TYPE_CHECKING:
    import h5py
    import torch

__all__ = [
    "AnyFloatPolicy",
    "AnyFloatQuantization",
    "CloningRefused",
    "H5IOStore",
    "adam_moments",
    "collect_uninitialized_variables",
    "compiled_metrics",
    "disable_autocast",
    "embeddings_variable",
    "finish_quantization",
    "flatten_layers",
    "in_stateless_scope",
    "initialize_deferred",
    "initialize_with",
    "is_selected",
    "kernel_variable",
    "loss_tracker",
    "mark_quantized",
    "open_hdf5_files_with",
    "optimized_variables",
    "preserve_tensorflow_availability",
    "quiet_lazy_tensorflow",
    "register_torch_parameters",
    "remove_matrix_variable",
    "replace_value",
    "save_state",
    "set_matrix_variable",
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
_HDF5_LOCK = threading.RLock()


# ----- Layers


def flatten_layers(
    layer: keras.layers.Layer, include_self: bool = True
) -> Iterator[keras.layers.Layer]:
    """Yields the layers inside a layer or model: `Layer._flatten_layers`.

    Args:
        layer: A layer or model.
        include_self: Whether to yield the layer itself first.

    Example:
        >>> len(list(flatten_layers(keras.Sequential([keras.layers.Dense(2)]))))
        2
    """
    return layer._flatten_layers(include_self=include_self)


def kernel_variable(layer: keras.layers.EinsumDense) -> keras.Variable:
    """Returns the kernel without LoRA adapters: `EinsumDense._kernel`.

    The exported `layer.kernel` adds the adapters and casts the sum.
    """
    return layer._kernel


def embeddings_variable(layer: keras.layers.Embedding) -> keras.Variable:
    """Returns the table without LoRA adapters: `Embedding._embeddings`."""
    return layer._embeddings


def set_matrix_variable(
    layer: keras.layers.EinsumDense | keras.layers.Embedding, variable: keras.Variable
) -> None:
    """Sets what `kernel_variable` or `embeddings_variable` returns."""
    if isinstance(layer, keras.layers.Embedding):
        layer._embeddings = variable
    else:
        layer._kernel = variable


def remove_matrix_variable(
    layer: keras.layers.EinsumDense | keras.layers.Embedding,
) -> None:
    """Removes what `kernel_variable` or `embeddings_variable` returns from a layer.

    `Layer.__delattr__` would collect garbage, which takes long for a whole model.
    """
    is_embedding = isinstance(layer, keras.layers.Embedding)
    name = "_embeddings" if is_embedding else "_kernel"
    layer._untrack_variable(getattr(layer, name))
    super(keras.layers.Layer, layer).__delattr__(name)


def mark_quantized(layer: keras.layers.Layer) -> None:
    """Keeps Keras from quantizing a layer for its policy: `Layer._is_quantized`."""
    layer._is_quantized = True


def is_selected(layer: keras.layers.Layer, filters: Any) -> bool:
    """Returns whether `quantize` applies to a layer: `should_quantize_layer`.

    Args:
        layer: A layer.
        filters: What `keras.Model.quantize` takes.
    """
    return should_quantize_layer(layer, filters)


def finish_quantization(model: keras.Model, mode: str) -> None:
    """Resets what was compiled for a model before its layers were quantized.

    `keras.Model.quantize` does so if it has quantized layers: `Model._post_quantize`.
    """
    model.train_function = None
    model.test_function = None
    model.predict_function = None
    model._post_quantize(mode)


class AnyFloatQuantization:
    """Mixin of a layer that can be quantized to int8 and compute in float16.

    Keras's own products cannot: `Layer._check_quantize_args`.
    """

    def _check_quantize_args(self, mode, compute_dtype):
        super()._check_quantize_args(mode, _any_float(mode, compute_dtype))


class AnyFloatPolicy:
    """As `AnyFloatQuantization`: `QuantizedDTypePolicy._check_quantization_mode`."""

    def _check_quantization_mode(self, mode, compute_dtype):
        super()._check_quantization_mode(mode, _any_float(mode, compute_dtype))


def _any_float(mode, compute_dtype):
    return "float32" if mode == "int8" else compute_dtype


def track_variables(
    layer: keras.layers.Layer, variables: Iterable[keras.Variable]
) -> None:
    """Adds variables to a built layer: `Layer._tracker`, `_track_variable`."""
    layer._tracker.unlock()
    for variable in variables:
        layer._track_variable(variable)
    layer._tracker.lock()


def untrack_variables(
    layer: keras.layers.Layer, variables: Iterable[keras.Variable]
) -> None:
    """Removes variables from a built layer: `Layer._untrack_variable`."""
    for variable in variables:
        layer._untrack_variable(variable)


def register_torch_parameters(model: keras.layers.Layer) -> None:
    """Registers variables as parameters of PyTorch: `Layer._track_variables`.

    Keras does so when a layer is built, except in a stateless scope. PyTorch only.
    """
    for layer in flatten_layers(model):
        layer._track_variables()


class CloningRefused:
    """Mixin of a functional model that `keras.models.clone_model` must not copy.

    That function returns a plain `keras.Model` for a class whose constructor takes
    other arguments than inputs and outputs, and calls no method for it but
    `Functional._run_through_graph`. It alone passes both of these arguments.
    """

    def _run_through_graph(self, inputs, **functions):
        if {"operation_fn", "call_fn"} <= set(functions):
            name = type(self).__name__
            raise ValueError(
                f"`keras.models.clone_model` would turn {name} into a plain "
                f"`keras.Model`. Use `{name}.from_config(model.get_config())`, which "
                "has new weights; `set_weights(model.get_weights())` copies the old."
            )
        return super()._run_through_graph(inputs, **functions)


# ----- Variables


def variable_layout(variable: keras.Variable) -> Any:
    """Returns the sharding of a variable: `Variable._layout`.

    Returns:
        `keras.distribution.TensorLayout`, `jax.sharding.Sharding` or `None`.
    """
    return variable._layout


def set_variable_layout(variable: keras.Variable, layout: Any) -> None:
    """Sets the sharding of a variable without a value: `Variable._layout`."""
    variable._layout = layout


def stored_value(variable: keras.Variable) -> Tensor | None:
    """Returns the tensor that a variable stores, or `None`: `Variable._value`.

    The exported `value` initializes a variable without a value, casts in an autocast
    scope, and returns another tensor in a stateless scope.
    """
    return variable._value


def disable_autocast(variable: keras.Variable) -> None:
    """Excludes a variable from autocast of mixed policies: `Variable._autocast`."""
    variable._autocast = False


def initialize_with(variable: keras.Variable, value: Tensor) -> None:
    """Sets the first value of a variable without a copy.

    Uses `Variable._initialize`, and `_initializer`, which must not run later.

    Args:
        variable: A variable without a value.
        value: Tensor of the backend with the variable's shape and dtype.
    """
    variable._initialize(value)
    variable._initializer = None


def replace_value(variable: keras.Variable, value: Tensor) -> None:
    """Sets the tensor that a variable stores, without a copy: `Variable._value`.

    The exported `assign` copies on PyTorch.

    Args:
        variable: A variable of JAX or PyTorch with a value.
        value: Tensor of its shape and dtype, on its devices.
    """
    if keras.config.backend() == "torch":
        variable._value.data = value  # The same parameter of PyTorch's module.
    else:
        variable._value = value


def initialize_deferred(variable: keras.Variable) -> None:
    """Runs a variable's initializer: `Variable._deferred_initialize`."""
    variable._deferred_initialize()


def uninitialized_variables() -> list[keras.Variable]:
    """Returns the variables that Keras will initialize after a stateless scope.

    Uses the global attribute `uninitialized_variables` of
    `keras.src.backend.common.global_state`.
    """
    return list(global_state.get_global_attribute(_UNINITIALIZED) or [])


@contextlib.contextmanager
def collect_uninitialized_variables() -> Iterator[list[keras.Variable]]:
    """Collects the variables that are created in a block but not initialized.

    Keras's list of them, see `uninitialized_variables`, is restored after the block,
    even if the block fails. So Keras neither initializes these variables later nor
    holds references to an abandoned model.

    Yields:
        A list which contains, after the block, the variables created in it.
    """
    pending = global_state.get_global_attribute(_UNINITIALIZED) or []
    created = []
    global_state.set_global_attribute(_UNINITIALIZED, [])
    try:
        yield created
        created.extend(global_state.get_global_attribute(_UNINITIALIZED))
    finally:
        global_state.set_global_attribute(_UNINITIALIZED, pending)


# ----- Training


def loss_tracker(model: keras.Model) -> keras.metrics.Mean:
    """Returns the loss metric of a compiled model: `Trainer._loss_tracker`."""
    return model._loss_tracker


def compiled_metrics(model: keras.Model) -> list[keras.metrics.Metric]:
    """Returns the metrics given to `compile`: `Trainer._compile_metrics`."""
    return model._compile_metrics.metrics


def optimized_variables(
    optimizer: keras.optimizers.Optimizer,
) -> list[keras.Variable]:
    """Returns the variables of an optimizer: `Optimizer._trainable_variables`.

    Returns:
        The variables that it was built for; empty if it is not built.
    """
    return optimizer._trainable_variables or []


def adam_moments(
    optimizer: keras.optimizers.Adam, variable: keras.Variable
) -> tuple[keras.Variable, keras.Variable, keras.Variable | None]:
    """Returns the moments that Adam stores for a variable.

    Uses `Optimizer._get_variable_index` and `_momentums`, `_velocities` and
    `_velocity_hats` of `keras.optimizers.Adam`.

    Returns:
        The first moment, the second moment, and the largest second moment, which is
        `None` without `amsgrad`.
    """
    index = optimizer._get_variable_index(variable)
    largest = optimizer._velocity_hats[index] if optimizer.amsgrad else None
    return optimizer._momentums[index], optimizer._velocities[index], largest


# ----- Saving


def save_state(
    saveable: keras.Model,
    store: H5IOStore,
    skipped: Iterable[keras.layers.Layer] = (),
) -> None:
    """Passes all variables of a model to a store: `saving_lib._save_state`.

    Args:
        saveable: A model.
        store: Instance of a subclass of `H5IOStore`.
        skipped: Layers to skip.
    """
    _keras_save_state(saveable, store, None, "", {id(layer) for layer in skipped})


@contextlib.contextmanager
def open_hdf5_files_with(open_file: Callable[[str, str], h5py.File]) -> Iterator[None]:
    """Replaces how Keras opens HDF5 files on the disk: `H5IOStore._get_h5_file`.

    Args:
        open_file: Function of the path and the mode, `"w"` or `"a"`. Files that are
            only read are opened as always.
    """

    def get_file(store, path, mode=None):
        mode = mode or store.mode
        if mode == "r" or store.archive or not isinstance(path, (str, Path)):
            return original(store, path, mode)
        return open_file(str(path), mode)

    with _HDF5_LOCK:
        original = H5IOStore._get_h5_file
        H5IOStore._get_h5_file = get_file
        try:
            yield
        finally:
            H5IOStore._get_h5_file = original


# ----- Backends


def torch_device() -> str:
    """Returns Keras's device for PyTorch tensors: `torch.core.get_device`."""
    from keras.src.backend.torch.core import get_device

    return get_device()


def torch_dtype(dtype: str) -> torch.dtype:
    """Returns PyTorch's dtype of a dtype name: `torch.core.to_torch_dtype`."""
    from keras.src.backend.torch.core import to_torch_dtype

    return to_torch_dtype(dtype)


def quiet_lazy_tensorflow() -> None:
    """Lets Keras import TensorFlow without messages, as it does to save a model.

    Wraps `keras.src.utils.module_utils.tensorflow.initialize`.
    """
    lazy = module_utils.tensorflow
    if "initialize" in vars(lazy):
        return

    def initialize():
        with quiet_tensorflow_import():
            type(lazy).initialize(lazy)

    lazy.initialize = initialize


@contextlib.contextmanager
def preserve_tensorflow_availability() -> Iterator[None]:
    """Restores Keras's cached answer whether TensorFlow is available after a block.

    Uses `keras.src.utils.module_utils.tensorflow._available`.
    """
    known = module_utils.tensorflow._available
    try:
        yield
    finally:
        module_utils.tensorflow._available = known
