"""Checkpoints in and out: readers of weight files, and the table that names weights."""
