"""What `compile` decides about training, for `fit` and the training steps to act on."""

import dataclasses

import keras

if keras.config.backend() == "jax":
    from keras_openllama.training.train_step_jax import TrainStepOptions


@dataclasses.dataclass(frozen=True)
class TrainPlan:
    """How a model is trained and evaluated: its attribute `train_plan`.

    `compile` sets it, once; `FitMixin` and the training steps read it. The defaults are
    those of a model that is not compiled: all is left to Keras.

    Attributes:
        auto_loss: bool, whether loss and metrics are the model's own: the mean of the
            cross-entropy over all targets of an epoch, with perplexity, and steps left
            out that are not finite. Else the step is Keras's.
        auto_learning_rate: bool, whether optimizer and rate follow the adapters that
            the model has when it is trained.
        step_options: `train_step_jax.TrainStepOptions` of the fused step; `None`
            where that step is not taken, as on other backends.
    """

    auto_loss: bool = False
    auto_learning_rate: bool = False
    step_options: object = None

    @property
    def fused(self):
        """bool, whether the step is the fused one of `train_step_jax`."""
        return self.step_options is not None


def plan_training(
    lm, loss, metrics, weighted_metrics, auto_learning_rate, step_options
):
    """The plan of a model.

    Args:
        lm: `OpenLlamaCausalLM`, with its optimizer.
        loss, metrics, weighted_metrics: what its `compile` was given.
        auto_learning_rate: bool, whether it was given no optimizer.
        step_options: triple of its `micro_batches`, `rematerialize` and `z_loss`.

    Returns:
        `TrainPlan`.

    Raises:
        ValueError: for options that need the fused step, where it is not taken.
    """
    auto_loss = loss == "auto" and not metrics
    auto_loss &= weighted_metrics == "auto" or not weighted_metrics
    # Keras's own step scales a loss, and knows how to compute a quantized head.
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
