"""Quantized weights: matrices of 8 and 4 bits, and which layers have how many."""

from keras_openllama.quantization.policies import WeightQuantizationPolicy
from keras_openllama.quantization.quantized_matrix import QuantizedMatrix
from keras_openllama.quantization.rounding import quantize_matrix
from keras_openllama.quantization.settings import WeightQuantizationConfig

__all__ = [
    "QuantizedMatrix",
    "WeightQuantizationConfig",
    "WeightQuantizationPolicy",
    "quantize_matrix",
]
