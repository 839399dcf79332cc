"""The compiled train and evaluation steps of a run on JAX, and their state."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp

from keras_openllama.runs import tpu_compiler_options
from keras_openllama.training.step_metrics import LossSums, StepMetrics
from keras_openllama.training.train_step_jax import (
    TrainStepOptions,
    loss_sums,
    split_micro_batches,
    train_step,
)

if TYPE_CHECKING:
    from keras_openllama.models.causal_lm import OpenLlamaCausalLM

# Heuristic: window of the running mean of the loss, in steps, and the number of steps
# after which spikes are detected.
LOSS_AVERAGE_STEPS = 100


class StepState(NamedTuple):
    """The state that a train step reads and updates.

    Attributes:
        trainable: Values of the trainable variables, in the model's order.
        non_trainable: Values of the other variables, in the model's order.
        optimizer: Values of the optimizer's variables, in its order.
        guard: State of the spike detection, float32 scalars: `"mean_loss"`, the running
            mean, and `"steps"`, the number of steps in it.
    """

    trainable: list[jax.Array]
    non_trainable: list[jax.Array]
    optimizer: list[jax.Array]
    guard: dict[str, jax.Array]


def initial_state(
    lm: OpenLlamaCausalLM, replicated: jax.sharding.Sharding | None = None
) -> StepState:
    """Returns the state of a model before its first step.

    Args:
        lm: The model, compiled, its optimizer built.
        replicated: Sharding of the arrays that are not variables.

    Returns:
        The state; it shares the arrays of the variables.
    """
    guard = {name: jnp.zeros((), "float32") for name in ("mean_loss", "steps")}
    return StepState(
        [v.value for v in lm.trainable_variables],
        [v.value for v in lm.non_trainable_variables],
        [v.value for v in lm.optimizer.variables],
        jax.device_put(guard, replicated),
    )


def state_to_dict(
    lm: OpenLlamaCausalLM, state: StepState, frozen: bool = True
) -> dict[str, dict[str, jax.Array]]:
    """Converts a state to the form that checkpoints hold.

    Args:
        lm: The model.
        state: Its state.
        frozen: Whether to include the variables that are not trainable.

    Returns:
        Arrays by variable path under `"model"` and `"optimizer"`, and `"guard"`.

    Raises:
        ValueError: if two variables have the same path.
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


def state_from_dict(
    lm: OpenLlamaCausalLM,
    arrays: Mapping[str, Mapping[str, jax.Array]],
    frozen: list[jax.Array] | None = None,
) -> StepState:
    """Converts what `state_to_dict` returned back to a state.

    Args:
        lm: The model.
        arrays: Arrays by part and variable path.
        frozen: Values of the variables that are not trainable, if `arrays` lacks them.

    Returns:
        The state.

    Raises:
        KeyError: if an array is missing.
    """
    model, optimizer = arrays["model"], arrays["optimizer"]
    return StepState(
        [model[v.path] for v in lm.trainable_variables],
        frozen or [model[v.path] for v in lm.non_trainable_variables],
        [optimizer[v.path] for v in lm.optimizer.variables],
        arrays["guard"],
    )


def _by_path(variables, values):
    by_path = {v.path: value for v, value in zip(variables, values, strict=True)}
    if len(by_path) != len(variables):
        raise ValueError("Two variables of the model have the same path.")
    return by_path


def abstract_arrays(arrays: Any) -> Any:
    """Returns shapes, dtypes and shardings of a tree of arrays.

    Args:
        arrays: Tree of `jax.Array`.

    Returns:
        The same tree of `jax.ShapeDtypeStruct`.

    Example:
        >>> abstract_arrays({"scale": jax.numpy.ones(4)})["scale"].shape
        (4,)
    """
    return jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), arrays
    )


def assign_to_model(lm: OpenLlamaCausalLM, state: StepState) -> None:
    """Assigns the values of a state to the model's variables, without a copy."""
    variables = [*lm.trainable_variables, *lm.non_trainable_variables]
    values = [*state.trainable, *state.non_trainable]
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)


def compile_step(
    lm: OpenLlamaCausalLM,
    state: StepState,
    batch: Any,
    options: TrainStepOptions,
    spike_threshold: float = 0.0,
    replicated: jax.sharding.Sharding | None = None,
) -> Callable[[StepState, Any], tuple[StepMetrics, StepState]]:
    """Compiles the train step of a run.

    The step is skipped, that is, the state is returned unchanged, if the loss or the
    gradient is not finite, or if the loss spikes.

    Args:
        lm: The model, compiled.
        state: Arrays or `jax.ShapeDtypeStruct`s; only shapes and shardings matter.
        batch: A batch like those to come, see `train_step_jax.loss_sums`.
        options: TrainStepOptions of the step.
        spike_threshold: A loss above this multiple of its running mean is a spike; 0
            disables the check.
        replicated: Sharding of the metrics.

    Returns:
        The compiled function of state and batch. It donates the buffers of the state.
    """
    lowered = lower_step(lm, state, batch, options, spike_threshold, replicated)
    device = next(iter(state.trainable[0].sharding.device_set))
    return tpu_compiler_options.compile_lowered(lowered, device)


def lower_step(
    lm: OpenLlamaCausalLM,
    state: StepState,
    batch: Any,
    options: TrainStepOptions,
    spike_threshold: float = 0.0,
    replicated: jax.sharding.Sharding | None = None,
) -> jax.stages.Lowered:
    """Traces the train step of a run, but does not compile it.

    Args:
        lm: See `compile_step`.
        state: See `compile_step`.
        batch: See `compile_step`.
        options: See `compile_step`.
        spike_threshold: See `compile_step`.
        replicated: See `compile_step`.

    Returns:
        The program, to be compiled by `tpu_compiler_options.compile_lowered`.
    """

    def step(state, batch):
        guard = state.guard
        mean = guard["mean_loss"]
        limit = None
        if spike_threshold:
            known = guard["steps"] >= LOSS_AVERAGE_STEPS
            limit = jnp.where(known, spike_threshold * mean, jnp.inf)
        metrics, (trainable, optimizer) = train_step(
            lm, state[:3], batch, options, limit
        )
        steps = guard["steps"] + 1
        # An arithmetic mean at first, then an exponential one.
        share = 1 / jnp.minimum(steps, LOSS_AVERAGE_STEPS)
        after = {"mean_loss": mean + share * (metrics.loss - mean), "steps": steps}
        applied = metrics.applied
        guard = jax.tree.map(lambda a, b: jnp.where(applied, a, b), after, guard)
        return metrics, StepState(trainable, state.non_trainable, optimizer, guard)

    shardings = jax.tree.map(lambda a: a.sharding, state)
    program = jax.jit(step, donate_argnums=0, out_shardings=(replicated, shardings))
    return program.lower(state, batch)


def compile_evaluation(
    lm: OpenLlamaCausalLM,
    state: StepState,
    batch: Any,
    options: TrainStepOptions,
    replicated: jax.sharding.Sharding | None = None,
) -> Callable[[StepState, Any], tuple[LossSums, jax.Array]]:
    """Compiles the evaluation of a batch, in micro-batches as the train step.

    Args:
        lm: See `compile_step`.
        state: See `compile_step`.
        batch: See `compile_step`.
        options: See `compile_step`.
        replicated: Sharding of the results.

    Returns:
        The compiled function of state and batch. It returns the sums over the targets,
        and the sum of their weights.
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
