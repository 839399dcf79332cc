"""Helpers that depend neither on Keras nor on models."""
