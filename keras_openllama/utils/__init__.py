"""Helpers that know nothing of Keras or of models."""
