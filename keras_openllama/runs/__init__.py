"""A training run on disk: recipe, trainer, checkpoints, metrics. Extra `train`."""
