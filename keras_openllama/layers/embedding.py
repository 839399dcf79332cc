"""The embedding of tokens, which can be quantized."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from keras_openllama.backend.arrays import as_numpy
from keras_openllama.backend.keras_private import embeddings_variable
from keras_openllama.layers.adapter_merging import add_product
from keras_openllama.layers.quantizable import QuantizableLayer
from keras_openllama.quantization.keras_formats import (
    dequantize_embeddings,
    stored_arrays,
)
from keras_openllama.utils.types import Tensor


@keras.saving.register_keras_serializable(package="keras_openllama")
class Embedding(QuantizableLayer, keras.layers.Embedding):
    """`keras.layers.Embedding` that is quantized by groups of columns.

    Keras names the groups of a file of weights by the names of classes. So the name is
    that of Keras's class, which models of version 0.2 have.

    Args:
        *args: see `keras.layers.Embedding`.
        **kwargs: see there.

    Example:
        >>> embedding = Embedding(100, 8)
        >>> embedding.build()
        >>> embedding.quantize("int8")
        >>> embedding(ops.zeros((2, 3), "int32")).shape
        (2, 3, 8)
    """

    quantization_role = "embedding"
    matrix_name = "embeddings"

    def quantized_call(self, inputs: Tensor, training: bool | None = None) -> Tensor:
        """Returns the embeddings of tokens, adapters included."""
        if not self.is_weight_quantized:
            return super().quantized_call(inputs, training=training)
        if keras.backend.standardize_dtype(inputs.dtype) not in ("int32", "int64"):
            inputs = ops.cast(inputs, "int32")
        found = (ops.take(v, inputs, axis=0) for v in self.quantized_variables())
        outputs = self.dequantize_tensors(*found)
        if self.lora_enabled:
            rows = ops.take(self.lora_embeddings_a, inputs, axis=0)
            added = ops.matmul(rows, self.lora_embeddings_b)
            outputs = outputs + (self.lora_alpha / self.lora_rank) * added
        return ops.cast(outputs, self.compute_dtype)

    def enable_lora(self, rank: int, *args: Any, **kwargs: Any) -> None:
        """Adds LoRA adapters; see `keras.layers.Embedding.enable_lora`.

        Args:
            rank: Rank of the adapters.
            *args: See there.
            **kwargs: See there.

        Raises:
            ValueError: If the layer is quantized, or has adapters.
        """
        if self.is_weight_quantized:
            raise ValueError(
                "A quantized embedding cannot get adapters. Call `enable_lora` before "
                f"`quantize`. Received: rank={rank!r}"
            )
        super().enable_lora(rank, *args, **kwargs)

    def save_own_variables(self, store: dict[str, Any]) -> None:
        """Saves the variables; adapters are merged, as Keras does."""
        if not self.is_weight_quantized:
            super().save_own_variables(store)
            return
        merged = None
        if self.lora_enabled:
            factors = (self.lora_embeddings_a, self.lora_embeddings_b)
            scale = self.lora_alpha / self.lora_rank
            arrays = [as_numpy(factor.value) for factor in factors]
            weights = self.quantized_matrix().dequantize()
            merged = self.round_matrix(add_product(weights, *arrays, scale))
        self.save_quantized(store, merged)

    def load_own_variables(self, store: dict[str, Any]) -> None:
        """Loads what `save_own_variables` saved.

        Args:
            store: Arrays by name.

        Raises:
            ValueError: If the file has another quantization.
        """
        arrays = stored_arrays({name: store[name] for name in store.keys()})
        self.check_number_of_arrays(len(arrays))
        if not self.is_weight_quantized:
            super().load_own_variables(store)
            return
        self.load_quantized(arrays)
        if self.lora_enabled:
            for factor in (self.lora_embeddings_a, self.lora_embeddings_b):
                factor.assign(ops.zeros(factor.shape))

    def _variable(self):
        return embeddings_variable(self)

    def _dequantize_keras_format(self, arrays, shape):
        return dequantize_embeddings(arrays, shape)
