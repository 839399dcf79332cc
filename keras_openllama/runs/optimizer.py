"""Creates the optimizer of a run from its settings."""

from __future__ import annotations

from typing import TYPE_CHECKING

import keras

from keras_openllama.optimizers import AdamW, WarmupCosine, muon
from keras_openllama.runs.train_config import TrainConfig

if TYPE_CHECKING:
    from keras_openllama.models.causal_lm import OpenLlamaCausalLM


def make_optimizer(config: TrainConfig) -> keras.optimizers.Optimizer:
    """Creates the optimizer and the learning-rate schedule of a run.

    Args:
        config: The settings of the steps.

    Returns:
        The optimizer, not built yet.

    Example:
        >>> from keras_openllama.runs.recipe import preset_recipe
        >>> make_optimizer(preset_recipe("nano")).name
        'adamw'
    """
    schedule = WarmupCosine(
        config.learning_rate,
        config.final_learning_rate,
        config.warmup_steps,
        config.steps,
    )
    make = {"adamw": AdamW, "muon": muon}[config.optimizer]
    return make(
        schedule,
        weight_decay=config.weight_decay,
        beta_1=config.beta_1,
        beta_2=config.beta_2,
        epsilon=config.epsilon,
        global_clipnorm=config.clip_norm,
    )


def compile_model(lm: OpenLlamaCausalLM, config: TrainConfig) -> None:
    """Compiles a model with the optimizer of a run, and builds the optimizer.

    Args:
        lm: The model.
        config: The settings of the steps.
    """
    # The train step for JAX computes the accuracy itself.
    metrics = [] if keras.config.backend() == "jax" else "auto"
    lm.compile(optimizer=make_optimizer(config), weighted_metrics=metrics)
    lm.optimizer.build(lm.trainable_variables)
