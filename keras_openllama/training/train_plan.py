"""The decisions of `compile` about training, which `fit` and the train steps follow."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import keras

if TYPE_CHECKING:
    from keras_openllama.backend.keras_hub import CausalLM

if keras.config.backend() == "jax":
    from keras_openllama.training.train_step_jax import TrainStepOptions


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
    step_options: tuple[int, str, float],
) -> TrainPlan:
    """Decides how a model is trained.

    Args:
        lm: `OpenLlamaCausalLM`, with its optimizer.
        loss: argument of `OpenLlamaCausalLM.compile`.
        metrics: argument of `OpenLlamaCausalLM.compile`.
        weighted_metrics: argument of `OpenLlamaCausalLM.compile`.
        auto_learning_rate: whether `compile` was called with `optimizer="auto"`.
        step_options: the arguments `micro_batches`, `rematerialize` and `z_loss`.

    Returns:
        The plan.

    Raises:
        ValueError: for step options that need the fused step if it cannot be used.

    Example:
        >>> plan_training(lm, "mse", None, None, True, (1, "none", 0.0)).auto_loss
        False
    """
    auto_loss = loss == "auto" and not metrics
    auto_loss &= weighted_metrics == "auto" or not weighted_metrics
    # Loss scaling, and on JAX a quantized head, need the step of Keras.
    auto_loss &= not _scales_loss(lm.optimizer)
    on_jax = keras.config.backend() == "jax"
    if on_jax:
        auto_loss &= lm.lm_head.quantization_mode is None
    if auto_loss and on_jax:
        return TrainPlan(True, auto_learning_rate, TrainStepOptions(*step_options))
    if step_options != (1, "none", 0.0):
        raise ValueError(
            "`micro_batches`, `rematerialize` and `z_loss` need the JAX backend, "
            'loss="auto", no metrics but weighted_metrics="auto" or [], a head '
            "that is not quantized, and an optimizer that does not scale the loss "
            f"(as for float16). Received: {step_options}, "
            f"backend={keras.config.backend()!r}, loss={loss!r}, "
            f"weighted_metrics={weighted_metrics!r}, optimizer={lm.optimizer!r}"
        )
    return TrainPlan(auto_loss, auto_learning_rate)


def _scales_loss(optimizer):
    return isinstance(optimizer, keras.optimizers.LossScaleOptimizer) or (
        optimizer is not None and optimizer.loss_scale_factor is not None
    )
