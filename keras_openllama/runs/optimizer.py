"""The optimizer of a run, by its settings."""

import keras

from keras_openllama.optimizers import AdamW, WarmupCosine, muon


def make_optimizer(config):
    """The optimizer of a `TrainConfig`, with its schedule."""
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


def compile_model(lm, config):
    """Gives a model the optimizer of a `TrainConfig`, built."""
    # JAX's step counts the accuracy itself.
    metrics = [] if keras.config.backend() == "jax" else "auto"
    lm.compile(optimizer=make_optimizer(config), weighted_metrics=metrics)
    lm.optimizer.build(lm.trainable_variables)
