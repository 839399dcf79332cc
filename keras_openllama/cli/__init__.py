"""The commands of `keras-openllama`, one module per command; `main` runs it."""
