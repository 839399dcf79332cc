"""Compilation of functions of a model's weights, on every backend."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import keras
from keras import ops, tree

from keras_openllama.utils.files import cache_directory
from keras_openllama.utils.types import Tensor

if keras.config.backend() == "jax":
    import jax
    from jax.experimental.compilation_cache import compilation_cache
elif keras.config.backend() == "tensorflow":
    import tensorflow as tf
elif keras.config.backend() == "torch":
    import torch
else:
    raise ImportError(
        "keras_openllama runs on the Keras backends jax, tensorflow and torch. "
        f"Received: backend={keras.config.backend()!r}; set the environment variable "
        "KERAS_BACKEND to one of them."
    )

# Heuristic: a program has about 1 MB, more on TPUs. JAX evicts the least recently used.
COMPILATION_CACHE_BYTES = 2 << 30


def compile_function(
    function: Callable[..., Any],
    model: Any,
    *,
    static: Sequence[str] = (),
    donate: Sequence[str] = (),
) -> Callable[..., Any]:
    """Compiles a function that reads the weights of a model.

    On JAX the weights are arguments of the compiled program, so that it depends neither
    on their values nor on their sharding. Changes of the sampler's random state are
    returned and assigned. PyTorch runs eagerly, without gradients.

    Args:
        function: Callable of tensors (nested in tuples or dicts) and static values that
            returns tensors.
        model: The `OpenLlamaCausalLM` whose weights and sampler the function uses.
        static: Names of keyword arguments that are Python values. Each combination of
            values is compiled separately.
        donate: Names of keyword arguments whose memory the result may reuse.

    Returns:
        A callable with the same keyword arguments as `function`.

    Example:
        >>> embed = compile_function(lambda ids: lm.backbone.token_embedding(ids), lm)
        >>> embed(ids=ops.ones((1, 4), "int32")).shape
        (1, 4, 256)
    """
    backend = keras.config.backend()
    if backend == "torch":
        return torch.no_grad()(function)
    if model.run_eagerly:
        return function
    if backend == "jax":
        return _compile_jax(function, model, static, donate)
    return _compile_tensorflow(function, model, static)


def generation_variables(
    model: Any,
) -> tuple[list[keras.Variable], list[keras.Variable]]:
    """Returns the variables that generation reads: weights, and random state."""
    sampler = model.sampler  # `None` before `compile`.
    return model.weights, sampler.variables if sampler else []


def stateless_scope(
    weights: Sequence[keras.Variable],
    weight_values: Sequence[Tensor],
    seeds: Sequence[keras.Variable],
    seed_values: Sequence[Tensor],
) -> keras.StatelessScope:
    """Returns a Keras scope in which the variables have the given values."""
    mapping = itertools.chain(
        zip(weights, weight_values, strict=True), zip(seeds, seed_values, strict=True)
    )
    return keras.StatelessScope(state_mapping=mapping)


@functools.cache
def use_compilation_cache() -> None:
    """Enables JAX's persistent compilation cache, which speeds up later processes.

    Does nothing if the user has set a directory or disabled the cache with JAX's
    settings `JAX_COMPILATION_CACHE_DIR` and `JAX_ENABLE_COMPILATION_CACHE`.
    """
    if (
        jax.config.jax_compilation_cache_dir
        or not jax.config.jax_enable_compilation_cache
    ):
        return
    jax.config.update("jax_compilation_cache_dir", str(cache_directory("jax")))
    jax.config.update("jax_compilation_cache_max_size", COMPILATION_CACHE_BYTES)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    # JAX reads the directory only at its first compilation, unless it is reset.
    compilation_cache.reset_cache()


def _compile_jax(function, model, static, donate):
    use_compilation_cache()

    def program(_weights, _seeds, **kwargs):
        weights, seeds = generation_variables(model)
        with stateless_scope(weights, _weights, seeds, _seeds) as scope:
            outputs = function(**kwargs)
        return outputs, [scope.get_current_value(seed) for seed in seeds]

    program.__name__ = function.__name__  # For JAX's logs and profiles.
    program = jax.jit(program, static_argnames=static, donate_argnames=donate)

    @functools.wraps(function)
    def call_program(**kwargs):
        weights, seeds = generation_variables(model)
        outputs, seed_values = program(
            [w.value for w in weights], [s.value for s in seeds], **kwargs
        )
        for seed, value in zip(seeds, seed_values, strict=True):
            seed.assign(value)
        return outputs

    return call_program


def _compile_tensorflow(function, model, static):
    programs = {}
    traced_weights = []

    @functools.wraps(function)
    def call_program(**kwargs):
        constants = {name: kwargs.pop(name) for name in static}
        tensors = tree.map_structure(ops.convert_to_tensor, kwargs)
        # A program refers to the variables it was traced with. LoRA and quantization
        # replace them.
        weights = model.weights
        if [id(w) for w in weights] != [id(w) for w in traced_weights]:
            programs.clear()
            traced_weights[:] = weights
        # One program per shape. `tf.function` would cache them, too, but warns about
        # retracing.
        key = (
            tuple(constants.items()),
            tuple((t.shape, t.dtype) for t in tree.flatten(tensors)),
        )
        if key not in programs:
            traced = tf.function(
                lambda **tensors: function(**tensors, **constants),
                jit_compile=True,
            )
            programs[key] = traced.get_concrete_function(**tensors)
        return programs[key](**tensors)

    return call_program


def while_loop(
    model: Any,
    cond: Callable[[Any], Tensor],
    body: Callable[[Any], Any],
    state: Any,
) -> Any:
    """`ops.while_loop` over one nested state; `body` may draw random numbers.

    On JAX the loop carries the random state of the sampler.

    Args:
        model: The model whose weights and sampler `body` uses.
        cond: `state -> bool scalar`.
        body: `state -> state`.
        state: Nested tensors.

    Returns:
        The final state.

    Example:
        >>> while_loop(lm, lambda i: i < 3, lambda i: i + 1, ops.zeros((), "int32"))
        Array(3, dtype=int32)
    """
    if keras.config.backend() != "jax":
        flat = tree.flatten(state)

        def unflatten(*leaves):
            return tree.pack_sequence_as(state, leaves)

        leaves = ops.while_loop(
            lambda *leaves: cond(unflatten(*leaves)),
            lambda *leaves: tuple(tree.flatten(body(unflatten(*leaves)))),
            tuple(flat),
        )
        return unflatten(*leaves)

    weights, seeds = generation_variables(model)
    values = [w.value for w in weights]

    def body_with_seeds(carry):
        state, seed_values = carry
        with stateless_scope(weights, values, seeds, seed_values) as scope:
            state = body(state)
        return state, [scope.get_current_value(seed) for seed in seeds]

    state, seed_values = jax.lax.while_loop(
        lambda carry: cond(carry[0]), body_with_seeds, (state, [s.value for s in seeds])
    )
    for seed, value in zip(seeds, seed_values, strict=True):
        seed.assign(value)
    return state
