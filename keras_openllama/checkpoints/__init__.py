"""Weights in files: one module per format, which reads and writes it."""
