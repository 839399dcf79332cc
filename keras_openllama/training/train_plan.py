"""The decisions of `compile` about training, which `fit` and the train steps follow."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import keras

from keras_openllama.layers.projection import is_float8

if TYPE_CHECKING:
    from keras_openllama.backend.keras_hub import CausalLM

if keras.config.backend() == "jax":
    from keras_openllama.training.train_step_jax import TrainStepOptions


_STEP_DEFAULTS = {"micro_batches": 1, "rematerialize": "none", "z_loss": 0.0}


@dataclasses.dataclass(frozen=True)
class TrainPlan:
    """How a model is trained and evaluated: its attribute `train_plan`.

    `compile` sets it; `FitMixin` and the train steps read it. The defaults are those of
    a model that was not compiled, for which Keras does everything.

    Attributes:
        auto_loss: whether loss and metrics are the model's own: the cross-entropy
            averaged over all targets of an epoch, with perplexity, where steps that are
            not finite are skipped. Otherwise the train step is that of Keras.
        auto_learning_rate: whether optimizer and learning rate depend on whether the
            model has adapters when it is trained.
        step_options: `train_step_jax.TrainStepOptions` of the fused step; `None` if
            that step is not used, as on other backends.

    Example:
        >>> TrainPlan().fused, TrainPlan(step_options=TrainStepOptions()).fused
        (False, True)
    """

    auto_loss: bool = False
    auto_learning_rate: bool = False
    step_options: TrainStepOptions | None = None

    @property
    def fused(self) -> bool:
        """Whether the step is that of `train_step_jax`, with a chunked loss."""
        return self.step_options is not None


def plan_training(
    lm: CausalLM,
    loss: Any,
    metrics: Any,
    weighted_metrics: Any,
    auto_learning_rate: bool,
    **step_options: int | str | float,
) -> TrainPlan:
    """Decides how a model is trained.

    Args:
        lm: `OpenLlamaCausalLM`, with its optimizer.
        loss: argument of `OpenLlamaCausalLM.compile`.
        metrics: argument of `OpenLlamaCausalLM.compile`.
        weighted_metrics: argument of `OpenLlamaCausalLM.compile`.
        auto_learning_rate: whether `compile` was called with `optimizer="auto"`.
        **step_options: the arguments `micro_batches`, `rematerialize` and `z_loss`.

    Returns:
        The plan.

    Raises:
        ValueError: for step options that need the fused step if it cannot be used.

    Example:
        >>> plan_training(lm, "mse", None, None, auto_learning_rate=True).auto_loss
        False
    """
    obstacle = _obstacle_to_auto_loss(lm, loss, metrics, weighted_metrics)
    backend = keras.config.backend()
    if obstacle is None and backend == "jax":
        options = TrainStepOptions(**step_options)
        return TrainPlan(True, auto_learning_rate, options)
    changed = [
        f"{name}={value!r}"
        for name, value in step_options.items()
        if value != _STEP_DEFAULTS[name]
    ]
    if changed:
        if backend != "jax":
            obstacle = f"the JAX backend. Received: backend={backend!r}"
        raise ValueError(f"{', '.join(changed)} needs {obstacle}")
    return TrainPlan(obstacle is None, auto_learning_rate)


def _obstacle_to_auto_loss(lm, loss, metrics, weighted_metrics):
    """Returns what the loss of the model would need, or `None`."""
    if loss != "auto":
        return f'loss="auto". Received: loss={loss!r}'
    if metrics:
        return f"`weighted_metrics` instead of `metrics`. Received: metrics={metrics!r}"
    if weighted_metrics and weighted_metrics != "auto":
        return (
            'weighted_metrics="auto" or []. Received: weighted_metrics='
            f"{weighted_metrics!r}"
        )
    if lm.losses:
        return "a model without regularizers and `add_loss`"
    if keras.config.backend() != "tensorflow" and is_float8(lm):
        # The gradients of its scales are their new values.
        return "a model that is not quantized to float8, which trains its scales"
    return None
