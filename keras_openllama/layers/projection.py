"""Linear projections without bias."""

from __future__ import annotations

import contextlib
import warnings
from typing import Any, TypeAlias

import keras
import numpy as np
from keras import ops

from keras_openllama.backend.arrays import as_numpy
from keras_openllama.backend.keras_private import (
    flatten_layers,
    kernel_variable,
    track_variables,
    untrack_variables,
)
from keras_openllama.layers.adapter_merging import add_product, is_saving_merged
from keras_openllama.layers.matmul import matmul_transposed
from keras_openllama.layers.quantizable import QuantizableLayer
from keras_openllama.layers.sharded_projection import mesh_of_gradients, project_sharded
from keras_openllama.quantization.keras_formats import dequantize_kernel, stored_arrays
from keras_openllama.quantization.tensors import multiply_quantized
from keras_openllama.utils.types import Shape, Tensor

if keras.config.backend() == "torch":
    from keras_openllama.layers.adapters_torch import (
        add_adapters,
        can_add_adapters,
    )

# What `Projection.remove_adapters` returns: adapters by name, rank and alpha.
Adapters: TypeAlias = tuple[dict[str, keras.Variable], int | None, float | None]
# Names of the adapters' variables, and of alpha beside them in files of weights.
FACTORS = ("lora_kernel_a", "lora_kernel_b")
ALPHA = "lora_alpha"


@keras.saving.register_keras_serializable(package="keras_openllama")
class Projection(QuantizableLayer, keras.layers.EinsumDense):
    """A linear projection without bias, its kernel `(outputs, inputs)`.

    Checkpoints store kernels in this orientation, so loading does not transpose them.
    The inputs of an output are adjacent in memory, which lets CPUs multiply a few rows
    at memory bandwidth (`benchmarks/README.md`). A quantized kernel is dequantized for
    each product.

    Args:
        units: int, size of the output.
        initializer_std: float, standard deviation of the normal initializer.
        quantization_role: str, see `WeightQuantizationConfig.format_for`.
        **kwargs: see `keras.layers.EinsumDense`.

    Call arguments:
        inputs: float tensor `(batch, length, inputs)`.

    Returns:
        A tensor `(batch, length, units)`.

    Example:
        >>> projection = Projection(128, initializer_std=0.02)
        >>> projection(ops.ones((1, 8, 64))).shape
        (1, 8, 128)
        >>> projection.kernel.shape
        (128, 64)
    """

    def __init__(
        self,
        units: int,
        initializer_std: float,
        quantization_role: str = "projection",
        **kwargs: Any,
    ) -> None:
        super().__init__(
            "bti,oi->bto",
            output_shape=(None, units),
            # One initializer per layer: a shared one would give equal values.
            kernel_initializer=keras.initializers.RandomNormal(stddev=initializer_std),
            **kwargs,
        )
        self.quantization_role = quantization_role

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        """Returns the shape of the output."""
        _, units = self.partial_output_shape
        return (*input_shape[:-1], units)

    def call(self, inputs: Tensor, training: bool | None = None) -> Tensor:
        """Returns the projection, adapters included."""
        kernel, mesh = kernel_variable(self), mesh_of_gradients()
        if mesh is None:
            outputs = matmul_transposed(inputs, kernel)
        else:
            outputs = project_sharded(inputs, kernel, mesh)
        return self._add_adapters(inputs, outputs)

    def quantized_call(self, inputs: Tensor, training: bool | None = None) -> Tensor:
        """Returns the projection by the quantized kernel, adapters included."""
        if self.is_weight_quantized:
            values, scales, *zeros = map(
                ops.convert_to_tensor, self.quantized_variables()
            )
            outputs = multiply_quantized(
                inputs,
                *(values, scales, zeros[0] if zeros else None),
                dequantize=self.dequantize_tensors,
                multiply=matmul_transposed,
            )
        else:
            # Keras's implementation expects adapters of a kernel `(inputs, outputs)`.
            with self._adapters_disabled():
                outputs = super().quantized_call(inputs, training=training)
        return self._add_adapters(inputs, outputs)

    @contextlib.contextmanager
    def _adapters_disabled(self):
        enabled, self.lora_enabled = self.lora_enabled, False
        try:
            yield
        finally:
            self.lora_enabled = enabled

    def _variable(self):
        return kernel_variable(self)

    def _dequantize_keras_format(self, arrays, shape):
        return dequantize_kernel(arrays, shape)

    def _add_adapters(self, inputs, outputs):
        """Adds the product with the adapters to the product with the kernel."""
        if not self.lora_enabled:
            return outputs
        scale = self.lora_alpha / self.lora_rank
        factors = map(self._cast_adapter, (self.lora_kernel_a, self.lora_kernel_b))
        if keras.config.backend() == "torch" and can_add_adapters(inputs):
            return add_adapters(outputs, inputs, *factors, scale)
        a, b = factors
        return outputs + scale * matmul_transposed(matmul_transposed(inputs, b), a)

    def _cast_adapter(self, adapter):
        return ops.cast(adapter, self.compute_dtype)

    def save_own_variables(self, store: dict[str, Any]) -> None:
        """Saves the kernel and the adapters apart; merged inside `saving_merged`."""
        adapters = self.adapters()
        if is_saving_merged() and adapters:
            self._save_merged(store)
            return
        if self.is_weight_quantized:
            self.save_quantized(store)
        else:
            with self._adapters_disabled():
                super().save_own_variables(store)
        for name, variable in adapters.items():
            store[name] = variable
        if adapters:
            store[ALPHA] = np.asarray(self.lora_alpha, "float64")

    def _save_merged(self, store):
        merged = self.merged_kernel()
        if not self.is_weight_quantized:
            store["0"] = merged.astype(kernel_variable(self).dtype)
            return
        warnings.warn(
            f"Saving a preset merges the adapters into the {self.quantization_mode}"
            " kernels and rounds them. Use `save_adapters` to save the adapters "
            "unchanged.",
            stacklevel=2,
        )
        self.save_quantized(store, self.round_matrix(merged))

    def load_own_variables(self, store: dict[str, Any]) -> None:
        """Loads the kernel and the adapters.

        A file without adapters sets the adapters' product to zero. Adapters that this
        layer does not have are merged into its kernel.

        Args:
            store: Arrays by name.

        Raises:
            ValueError: If the file has adapters of another rank or alpha, its kernel
                has another quantization, or adapters would be merged into a quantized
                kernel.
        """
        stored = {name: store[name] for name in (*FACTORS, ALPHA) if name in store}
        base = {name: store[name] for name in store.keys() if name not in stored}
        self.check_number_of_arrays(len(base))
        if stored:
            self._check_adapters(stored)
        kept = {name: ops.copy(v.value) for name, v in self.adapters().items()}
        if self.is_weight_quantized and self.built:
            self.load_quantized(stored_arrays(base))
        else:
            super().load_own_variables(base)
        if self.lora_enabled:
            self.lora_kernel_a.assign(ops.zeros(self.lora_kernel_a.shape))
            # If both factors were zero, as Keras leaves them, neither would ever have a
            # gradient.
            self.lora_kernel_b.assign(stored.get(FACTORS[1], kept[FACTORS[1]]))
            if stored:
                self.lora_kernel_a.assign(stored[FACTORS[0]])
        elif stored:
            outputs, inputs = (stored[name] for name in FACTORS)
            scale = float(stored[ALPHA]) / len(inputs)
            merged = add_product(base["0"], outputs, inputs, scale)
            kernel = kernel_variable(self)
            kernel.assign(merged.astype(kernel.dtype))

    def _check_adapters(self, stored):
        """Raises a `ValueError` if adapters of a file cannot be loaded."""
        rank, alpha = len(stored[FACTORS[1]]), float(stored[ALPHA])
        if not self.lora_enabled and self.quantization_mode is not None:
            raise ValueError(
                f"The file has adapters for {self.path}, which has none and is "
                f"quantized ({self.quantization_mode}). Add adapters with "
                f"`enable_lora` (rank {rank}, alpha {alpha:g}) before loading."
            )
        if self.lora_enabled and (rank, alpha) != (self.lora_rank, self.lora_alpha):
            raise ValueError(
                f"The adapters of {self.path} have rank {self.lora_rank} and alpha "
                f"{self.lora_alpha:g}, and those of the file rank {rank} and alpha "
                f"{alpha:g}. Add adapters like those of the file with `enable_lora` "
                "to a model without adapters before loading."
            )

    def enable_lora(
        self,
        rank: int,
        lora_alpha: float | None = None,
        a_initializer: Any = "zeros",
        b_initializer: Any = None,
    ) -> None:
        """Adds LoRA adapters: the kernel becomes `kernel + lora_alpha / rank * a @ b`.

        As in the paper and in PEFT, the factor of the inputs is random and the factor
        of the outputs is zero. (Keras names the factors by the axes of its kernels,
        which are transposed.)

        Args:
            rank: Rank of the adapters.
            lora_alpha: Scale of the adapters, see above. `None` stands for `rank`.
            a_initializer: Keras initializer of `a`, `(outputs, rank)`.
            b_initializer: Keras initializer of `b`, `(rank, inputs)`. `None` stands for
                the uniform distribution within 1 / sqrt(inputs), as in PEFT.

        Raises:
            ValueError: If the layer already has adapters.

        Example:
            >>> projection = Projection(128, initializer_std=0.02)
            >>> projection.build((None, None, 64))
            >>> projection.enable_lora(rank=4)
            >>> [adapter.shape for adapter in projection.adapters().values()]
            [(128, 4), (4, 64)]

        Source: LoRA (arXiv:2106.09685), section 4.1; https://github.com/huggingface/peft.
        """
        if b_initializer is None:
            limit = self.matrix_shape[1] ** -0.5
            b_initializer = keras.initializers.RandomUniform(-limit, limit)
        super().enable_lora(rank, lora_alpha, a_initializer, b_initializer)

    @property
    def kernel(self) -> Tensor:
        """The kernel; with adapters or quantized, its weights in the compute dtype."""
        if not self.is_weight_quantized:
            return super().kernel
        kernel = self.dequantized_tensor()
        if not self.lora_enabled:
            return kernel
        product = ops.matmul(self.lora_kernel_a, self.lora_kernel_b)
        added = (self.lora_alpha / self.lora_rank) * product
        return ops.cast(ops.cast(kernel, "float32") + added, self.compute_dtype)

    def adapters(self) -> dict[str, keras.Variable]:
        """Returns the adapters by name; empty if the layer has none."""
        return {name: getattr(self, name) for name in FACTORS if self.lora_enabled}

    def merged_kernel(self) -> np.ndarray:
        """Returns the kernel with the adapters merged, float32 `(outputs, inputs)`."""
        outputs, inputs = (as_numpy(v.value) for v in self.adapters().values())
        matrix = self.quantized_matrix()
        if matrix is None:
            kernel = as_numpy(kernel_variable(self).value)
        else:
            kernel = matrix.dequantize()
        return add_product(kernel, outputs, inputs, self.lora_alpha / self.lora_rank)

    def remove_adapters(self) -> Adapters:
        """Removes the adapters and returns the argument of `restore_adapters`."""
        removed = (self.adapters(), self.lora_rank, self.lora_alpha)
        untrack_variables(self, removed[0].values())
        self.lora_enabled, self.lora_rank, self.lora_alpha = False, None, None
        return removed

    def restore_adapters(self, removed: Adapters) -> None:
        """Restores the adapters that `remove_adapters` returned."""
        variables, self.lora_rank, self.lora_alpha = removed
        track_variables(self, variables.values())
        for name, variable in variables.items():
            setattr(self, name, variable)  # The layer may have had others since.
        self.lora_enabled = True

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments of the constructor."""
        config = keras.layers.Layer.get_config(self)
        _, units = self.partial_output_shape
        return {
            **config,
            "units": units,
            "initializer_std": self.kernel_initializer.stddev,
            "quantization_role": self.quantization_role,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Projection:
        """Creates the layer from `get_config`."""
        return cls(**config)


def is_float8(model: keras.layers.Layer) -> bool:
    """Returns whether a layer of a model is quantized to float8.

    Example:
        >>> is_float8(lm)
        False
    """
    return any(layer.quantization_mode == "float8" for layer in flatten_layers(model))
