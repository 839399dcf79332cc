"""Weights in files: the formats, and what they share.

One module per format reads and writes it: `transformers`, `keras_hub`, `easylm`,
`peft`; `training_run` is read only. The container formats are in `files`.
"""
