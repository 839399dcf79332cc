"""A `TrainConfig` of a few training steps."""

from keras_openllama.runs.train_config import TrainConfig

SETTINGS = {
    "sequence_length": 32,
    "batch_size": 4,
    "steps": 10,
    "learning_rate": 1e-2,
    "final_learning_rate": 1e-3,
    "warmup_steps": 0,
    "beta_1": 0.9,
    "beta_2": 0.95,
    "epsilon": 1e-8,
    "weight_decay": 0.0,
    "clip_norm": 1.0,
}


def small_config(**settings):
    """`TrainConfig` of `SETTINGS` with some of them replaced."""
    return TrainConfig(**{**SETTINGS, **settings})
