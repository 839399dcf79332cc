"""The commands of `keras-openllama`, one module each; `main` runs it."""
