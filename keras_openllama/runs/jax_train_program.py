"""The compiled programs of a run on JAX, and the arrays that they read and write."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from keras_openllama.runs import tpu_compiler_options
from keras_openllama.training.step_metrics import LossSums
from keras_openllama.training.train_step_jax import (
    loss_sums,
    split_micro_batches,
    train_step,
)

# Ours: the running mean of the loss is over about so many steps, and is relied on after
# as many.
LOSS_MEMORY = 100


class State(NamedTuple):
    """Everything that a step reads and writes.

    Attributes:
        trainable, non_trainable, optimizer: lists of `jax.Array`, values of the
            variables in the order that the model and the optimizer have them in.
        guard: dict of float32 scalars: `"mean_loss"` and `"steps"`, how many made it.
    """

    trainable: list
    non_trainable: list
    optimizer: list
    guard: dict


def state_of(lm, replicated=None):
    """The state of a model that was just built and compiled.

    Args:
        lm: `OpenLlamaCausalLM`, its optimizer built.
        replicated: sharding of what is no variable, or `None`.
    """
    guard = {name: jnp.zeros((), "float32") for name in ("mean_loss", "steps")}
    return State(
        [v.value for v in lm.trainable_variables],
        [v.value for v in lm.non_trainable_variables],
        [v.value for v in lm.optimizer.variables],
        jax.device_put(guard, replicated),
    )


def named(lm, state, frozen=True):
    """A state as a dict of dicts by variable path, which checkpoints hold.

    Args:
        lm: `OpenLlamaCausalLM`.
        state: `State`.
        frozen: bool, whether the variables that are not trained are in it.
    """
    model, values = [*lm.trainable_variables], [*state.trainable]
    if frozen:
        model += lm.non_trainable_variables
        values += state.non_trainable
    return {
        "model": _by_path(model, values),
        "optimizer": _by_path(lm.optimizer.variables, state.optimizer),
        "guard": state.guard,
    }


def unnamed(lm, arrays, frozen=None):
    """The state of what `named` returned; `frozen` are the values that it lacks."""
    model, optimizer = arrays["model"], arrays["optimizer"]
    return State(
        [model[v.path] for v in lm.trainable_variables],
        frozen or [model[v.path] for v in lm.non_trainable_variables],
        [optimizer[v.path] for v in lm.optimizer.variables],
        arrays["guard"],
    )


def _by_path(variables, values):
    named = {v.path: value for v, value in zip(variables, values, strict=True)}
    if len(named) != len(variables):
        raise ValueError("Two variables of the model have the same path.")
    return named


def abstract(arrays):
    """Shapes, dtypes and shardings of arrays, as a tree of `jax.ShapeDtypeStruct`."""
    return jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), arrays
    )


def put_back(lm, state):
    """Gives the model the values of a state, without a copy."""
    variables = [*lm.trainable_variables, *lm.non_trainable_variables]
    values = [*state.trainable, *state.non_trainable]
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)


def compile_step(lm, state, batch, options, spike_threshold=0.0, replicated=None):
    """Compiles the step of a run.

    Args:
        lm: `OpenLlamaCausalLM`, compiled.
        state: `State`, or one of `jax.ShapeDtypeStruct`s; only shapes and shardings
            count.
        batch: a batch like those to come, see `train_step_jax.loss_sums`.
        options: `train_step_jax.TrainStepOptions`.
        spike_threshold: float, a loss above so many times its running mean skips the
            step; 0 is never.
        replicated: sharding of the metrics, or `None`.

    Returns:
        A compiled program `(state, batch) -> (StepMetrics, state)`, which takes over
        the memory of the state.
    """

    def step(state, batch):
        guard = state.guard
        mean = guard["mean_loss"]
        limit = None
        if spike_threshold:
            known = guard["steps"] >= LOSS_MEMORY
            limit = jnp.where(known, spike_threshold * mean, jnp.inf)
        metrics, (trainable, optimizer) = train_step(
            lm, state[:3], batch, options, limit
        )
        steps = guard["steps"] + 1
        # A plain mean at first, then an exponential one.
        share = 1 / jnp.minimum(steps, LOSS_MEMORY)
        after = {"mean_loss": mean + share * (metrics.loss - mean), "steps": steps}
        applied = metrics.applied
        guard = jax.tree.map(lambda a, b: jnp.where(applied, a, b), after, guard)
        return metrics, State(trainable, state.non_trainable, optimizer, guard)

    shardings = jax.tree.map(lambda a: a.sharding, state)
    program = jax.jit(step, donate_argnums=0, out_shardings=(replicated, shardings))
    lowered = program.lower(state, batch)
    device = next(iter(state.trainable[0].sharding.device_set))
    return tpu_compiler_options.compiled(lowered, device)


def compile_evaluation(lm, state, batch, options, replicated=None):
    """Compiles an evaluation, by micro-batches as the step.

    Args:
        lm, state, batch, options, replicated: see `compile_step`.

    Returns:
        A compiled program `(state, batch) -> (step_metrics.LossSums, sum of weights)`.
    """

    def evaluate(state, batch):
        values = state.trainable, state.non_trainable

        def add(total, part):
            sums = loss_sums(lm, values, part, options)
            return jax.tree.map(jnp.add, total, sums), None

        parts = jax.tree.map(
            lambda a: split_micro_batches(a, options.micro_batches), batch
        )
        total, _ = jax.lax.scan(add, LossSums(*(jnp.zeros(()),) * 3), parts)
        return total, jnp.sum(batch[2])

    return jax.jit(evaluate, out_shardings=replicated).lower(state, batch).compile()
