"""Training: the data. Needs the extra `train`."""
