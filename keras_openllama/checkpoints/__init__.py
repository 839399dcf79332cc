"""Checkpoint formats.

One module per format reads and writes it: `transformers`, `keras_hub`, `easylm` and
`peft`. `training_run` reads the checkpoints of a training run, which `runs` writes. The
container formats (safetensors, PyTorch's zip files, msgpack) are in `files`.
"""
