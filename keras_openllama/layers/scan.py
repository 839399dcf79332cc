"""Layers that are alike as one that runs again and again: a scan (JAX)."""

import jax
import jax.numpy as jnp
import keras
from jax.sharding import NamedSharding, PartitionSpec

from keras_openllama.backend.keras_private import variable_layout


def scan_layers(layers, through, x):
    """Takes hidden states through layers, of which only the first is compiled.

    XLA compiles a program of any depth in the time of two layers or so. The variables
    are stacked anew in each step, which costs a copy of a device's part of them.

    Args:
        layers: list of built Keras layers, alike but for the values of their variables.
        through: callable `(x, values)` that computes the first layer; made by
            `with_values`, and wrapped as wanted.
        x: tensor that goes from layer to layer.

    Returns:
        What the last layer gives.
    """
    groups = zip(*(layer.variables for layer in layers), strict=True)
    stacked = [_stacked(group) for group in groups]
    x, _ = jax.lax.scan(lambda x, values: (through(x, values), None), x, stacked)
    return x


def with_values(layer, call):
    """`call` with other values for the layer's variables.

    Args:
        layer: built Keras layer.
        call: callable `x -> x`, which calls the layer.

    Returns:
        A callable `(x, values)`; values are those of `layer.variables`.
    """

    def through(x, values):
        mapping = zip(layer.variables, values, strict=True)
        with keras.StatelessScope(state_mapping=mapping):
            return call(x)

    return through


def _stacked(variables):
    """Values of variables, each laid over the devices as they are; gradients, too.

    The layout is stated here, not where a layer uses its values: what is stated in a
    scan counts as computed there, and the scan would keep a second copy of it.
    """
    stacked = jnp.stack([jnp.asarray(v.value) for v in variables])
    layout = variable_layout(variables[0])
    if layout is None:
        return stacked
    sharding = getattr(layout, "backend_layout", layout)  # Either may be there.
    spec = PartitionSpec(None, *sharding.spec)
    return jax.lax.with_sharding_constraint(stacked, NamedSharding(sharding.mesh, spec))
