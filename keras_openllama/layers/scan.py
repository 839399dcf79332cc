"""Identical layers as one layer in a scan, to save compilation time (JAX)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import keras
from jax.sharding import NamedSharding, PartitionSpec

from keras_openllama.backend.keras_private import variable_layout


def scan_layers(
    layers: Sequence[keras.layers.Layer],
    apply_layer: Callable[[jax.Array, Sequence[jax.Array]], jax.Array],
    x: jax.Array,
    layers_per_step: int = 1,
) -> jax.Array:
    """Applies layers in sequence by `jax.lax.scan`, which compiles only one of them.

    XLA compiles a model of any depth in about the time of two layers. Each step stacks
    the variables again, which costs a copy of each device's shard of them.

    Args:
        layers: Built Keras layers, identical except for the values of their variables.
        apply_layer: Callable `(x, values)` that computes the first layer with other
            values of its variables: `functional_call`, possibly wrapped.
        x: Input of the first layer.
        layers_per_step: Number of layers in a step of the scan, whose collectives
            overlap with each other's computation. If it does not divide the number of
            layers, their greatest common divisor is used.

    Returns:
        Output of the last layer, of the shape and dtype of `x`.

    Example:
        >>> layers = [keras.layers.Dense(4) for _ in range(3)]
        >>> for layer in layers:
        ...     layer.build((None, 4))
        >>> apply_layer = functional_call(layers[0], layers[0])
        >>> scan_layers(layers, apply_layer, jnp.ones((2, 4))).shape
        (2, 4)
    """
    count = math.gcd(len(layers), layers_per_step)
    groups = list(zip(*(layer.variables for layer in layers), strict=True))
    # One stack for each layer of a step: `unroll` of JAX would split and join stacks.
    stacked = [
        [_stacked(group[first::count], x.dtype) for group in groups]
        for first in range(count)
    ]

    def step(x, values_of_layers):
        for values in values_of_layers:
            x = apply_layer(x, values)
        return x, None

    x, _ = jax.lax.scan(step, x, stacked)
    return x


def functional_call(
    layer: keras.layers.Layer, call: Callable[[jax.Array], jax.Array]
) -> Callable[[jax.Array, Sequence[jax.Array]], jax.Array]:
    """Makes the values of a layer's variables an argument.

    Args:
        layer: Built Keras layer.
        call: Callable `x -> x` that calls the layer.

    Returns:
        A callable `(x, values)`, with values in the order of `layer.variables`.

    Example:
        >>> layer = keras.layers.Dense(1)
        >>> layer.build((None, 2))
        >>> apply_layer = functional_call(layer, layer)
        >>> apply_layer(jnp.ones((1, 2)), [jnp.ones((2, 1)), jnp.zeros(1)]).item()
        2.0
    """

    def apply_layer(x, values):
        mapping = zip(layer.variables, values, strict=True)
        with keras.StatelessScope(state_mapping=mapping):
            return call(x)

    return apply_layer


def _stacked(variables, dtype):
    """Stacked values of variables, with their sharding; gradients are sharded alike.

    The sharding is constrained here rather than inside the scan: a constraint in the
    scan counts as a computation, whose result the scan would save as a second copy.

    Trained matrices are stacked in the dtype of the states, in which layers use them.
    Then their gradients are stacked in that dtype, too, which needs half the memory.
    """
    first = variables[0]
    is_float = keras.backend.is_float_dtype(first.dtype)
    if not (is_float and first.trainable and len(first.shape) == 2):
        dtype = first.dtype
    stacked = jnp.stack([jnp.asarray(v.value).astype(dtype) for v in variables])
    layout = variable_layout(first)
    if layout is None:
        return stacked
    sharding = getattr(layout, "backend_layout", layout)  # Keras's or JAX's.
    spec = PartitionSpec(None, *sharding.spec)
    return jax.lax.with_sharding_constraint(stacked, NamedSharding(sharding.mesh, spec))
