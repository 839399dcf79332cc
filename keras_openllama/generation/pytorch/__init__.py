"""The decoding step as plain functions of PyTorch."""
