"""Compiles a function of a model's weights on whichever backend Keras runs."""

import functools
import itertools
import os
from pathlib import Path

import keras
from keras import ops, tree

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

# Ours: a program is about 1 MB, more on TPUs; JAX removes those unused for longest.
COMPILATION_CACHE_BYTES = 2 << 30


def compile_function(function, model, *, static=(), donate=()):
    """A compiled version of `function`, which reads the weights of `model`.

    On JAX the weights are arguments of the compiled program, so that neither their
    values nor their sharding are frozen into it. Random state that the model's sampler
    changes is carried out again. PyTorch runs eagerly, without gradients.

    Args:
        function: callable of tensors (nested in tuples or dicts) and static values,
            returning tensors.
        model: the `OpenLlamaCausalLM` whose weights and sampler it uses.
        static: names of keyword arguments that are Python values; each combination
            compiles anew.
        donate: names of keyword arguments whose memory the result may take over.

    Returns:
        A callable with the same keyword arguments as `function`.
    """
    backend = keras.config.backend()
    if backend == "torch":
        return torch.no_grad()(function)
    if model.run_eagerly:
        return function
    if backend == "jax":
        return _jax(function, model, static, donate)
    return _tensorflow(function, model, static)


def variables_of(model):
    """Weights and the sampler's random state: all that generation reads."""
    return model.weights, model.sampler.variables


def stateless_scope(weights, weight_values, seeds, seed_values):
    """A Keras scope in which the variables have the given values."""
    mapping = itertools.chain(
        zip(weights, weight_values, strict=True), zip(seeds, seed_values, strict=True)
    )
    return keras.StatelessScope(state_mapping=mapping)


@functools.cache
def use_compilation_cache():
    """Lets JAX keep compiled programs on disk, so that a second process starts fast.

    Does nothing where the user has chosen a directory or switched the cache off, with
    JAX's own settings `JAX_COMPILATION_CACHE_DIR` and `JAX_ENABLE_COMPILATION_CACHE`.
    """
    if (
        jax.config.jax_compilation_cache_dir
        or not jax.config.jax_enable_compilation_cache
    ):
        return
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    jax.config.update(
        "jax_compilation_cache_dir", str(Path(home) / "keras_openllama" / "jax")
    )
    jax.config.update("jax_compilation_cache_max_size", COMPILATION_CACHE_BYTES)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    # JAX looks once for a directory, at its first compilation: let it look again.
    compilation_cache.reset_cache()


def _jax(function, model, static, donate):
    use_compilation_cache()

    def program(_weights, _seeds, **kwargs):
        weights, seeds = variables_of(model)
        with stateless_scope(weights, _weights, seeds, _seeds) as scope:
            outputs = function(**kwargs)
        return outputs, [scope.get_current_value(seed) for seed in seeds]

    program.__name__ = function.__name__  # What JAX's logs and profiles show.
    program = jax.jit(program, static_argnames=static, donate_argnames=donate)

    @functools.wraps(function)
    def run(**kwargs):
        weights, seeds = variables_of(model)
        outputs, seed_values = program(
            [w.value for w in weights], [s.value for s in seeds], **kwargs
        )
        for seed, value in zip(seeds, seed_values, strict=True):
            seed.assign(value)
        return outputs

    return run


def _tensorflow(function, model, static):
    programs = {}
    weights_seen = []

    @functools.wraps(function)
    def run(**kwargs):
        constants = {name: kwargs.pop(name) for name in static}
        tensors = tree.map_structure(ops.convert_to_tensor, kwargs)
        # A program keeps the variables that it saw, and LoRA and quantization change
        # them.
        weights = model.weights
        if [id(w) for w in weights] != [id(w) for w in weights_seen]:
            programs.clear()
            weights_seen[:] = weights
        # One program a shape, kept here: `tf.function` does the same, but warns of it
        # as if it were a mistake.
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

    return run


def while_loop(model, cond, body, state):
    """`ops.while_loop` over one nested state, in which `body` may draw random numbers.

    On JAX the random state of the sampler is part of what the loop carries.

    Args:
        model: the model whose weights and sampler `body` uses.
        cond: `state -> bool scalar`.
        body: `state -> state`.
        state: nested tensors.
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

    weights, seeds = variables_of(model)
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
