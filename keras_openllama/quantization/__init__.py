"""Quantized weights: matrices of 8 and 4 bits, and which layers have how many."""
