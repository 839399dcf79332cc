"""What projections and the token embedding share: a matrix that can be quantized."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_openllama.backend.arrays import as_numpy
from keras_openllama.backend.keras_private import (
    AnyFloatQuantization,
    mark_quantized,
    remove_matrix_variable,
    set_matrix_variable,
)
from keras_openllama.quantization.keras_formats import is_keras_format
from keras_openllama.quantization.policies import (
    MODES,
    MatrixFormat,
    WeightQuantizationPolicy,
    matrix_format,
    policy_of,
)
from keras_openllama.quantization.quantized_matrix import (
    QuantizedMatrix,
    count_groups,
    stored_columns,
)
from keras_openllama.quantization.rounding import quantize_matrix
from keras_openllama.quantization.settings import resolve_config
from keras_openllama.quantization.tensors import dequantize_tensor
from keras_openllama.utils.types import Shape, Tensor


class QuantizableLayer(AnyFloatQuantization):
    """Mixin of a layer of Keras whose weights are one matrix, which can be quantized.

    A quantized layer has the variables `NAME` (the values), `NAME_scale` and, with zero
    points, `NAME_zero`, as `QuantizedMatrix` describes them.
    """

    # What the layer is for, see `WeightQuantizationConfig.format_for`.
    quantization_role = "projection"
    matrix_name = "kernel"
    _matrix_shape = None

    def __new__(cls, *args: Any, **kwargs: Any) -> QuantizableLayer:
        """Lets `quantize` resolve its arguments before Keras does."""
        layer = super().__new__(cls, *args, **kwargs)
        # Keras wraps the method, and replaces `config=None` by its own default.
        wrapper = layer.quantize

        @functools.wraps(wrapper)
        def quantize(mode=None, config=None, **options):
            resolved = resolve_config(mode, config, whole_model=False)
            # With its own configuration, Keras checks that the mode is the same.
            keep_mode = resolved is None or resolved is config
            wrapper(mode if keep_mode else None, resolved, **options)

        layer.quantize = quantize
        return layer

    def build(self, input_shape: Shape | None = None) -> None:
        """Creates the variables, in the format that the dtype policy describes."""
        policy = policy_of(self)
        found = matrix_format(policy)
        if found and found.mode != policy.quantization_mode:
            warnings.warn(
                f"The dtype policy {policy.name!r} is Keras's own for "
                f"{policy.quantization_mode}. Its weights are converted to "
                f"{found.mode}, which changes them little.",
                stacklevel=2,
            )
            self.dtype_policy = self._policy(found)
        super().build(input_shape)

    def quantized_build(
        self, input_shape: Shape, mode: str, config: Any = None
    ) -> None:
        """Creates the variables of a quantized layer, for Keras.

        Args:
            input_shape: Shape of the matrix.
            mode: Mode of quantization.
            config: Not used.
        """
        if mode in MODES:
            self._create_quantized(tuple(input_shape), matrix_format(policy_of(self)))
        else:
            super().quantized_build(input_shape, mode, config)

    def quantize(
        self,
        mode: str | None = None,
        type_check: bool = True,
        config: Any = None,
        matrix: QuantizedMatrix | None = None,
    ) -> None:
        """Quantizes the matrix.

        Args:
            mode: `"int8"`, `"int4"` or `"float8"`.
            type_check: Not used. Keras's check rejects subclasses, which may compute
                something else.
            config: A `keras.quantizers.QuantizationConfig` instead of a mode; see
                `WeightQuantizationConfig`.
            matrix: The quantized weights in this format; `None` rounds the weights.

        Raises:
            ValueError: See `resolve_config`; or if the layer is quantized already.
        """
        if mode not in MODES:
            super().quantize(mode, type_check=False, config=config)
            return
        chosen = config.format_for(self.quantization_role)
        if chosen is None:
            return
        if matrix is None:
            matrix = self.round_matrix(as_numpy(self._variable().value), chosen)
        remove_matrix_variable(self)
        self._create_quantized(matrix.shape, chosen)
        self.dtype_policy = self._policy(chosen)
        self.assign_quantized(matrix)

    def _policy(self, chosen):
        source = policy_of(self)
        config = source.get_config()
        name = config.get("source_name", config.get("name"))
        return WeightQuantizationPolicy(
            chosen.mode, name, chosen.group_size, chosen.symmetric
        )

    def _create_quantized(self, shape, chosen):
        outputs, inputs = shape
        group_size = chosen.group_size_of(inputs)
        groups = (outputs, count_groups(inputs, group_size))
        values = (outputs, stored_columns(chosen.bits, inputs))
        self._matrix_shape, self._group_size = (outputs, inputs), group_size
        self._bits = chosen.bits
        # Keras reads this name for adapters of int4.
        self.original_kernel_shape = (outputs, inputs)
        dtype = "int8" if chosen.bits == 8 else "uint8"
        variable = self._add_constant(self.matrix_name, values, dtype)
        set_matrix_variable(self, variable)
        scale, zero = f"{self.matrix_name}_scale", f"{self.matrix_name}_zero"
        setattr(self, scale, self._add_constant(scale, groups, "float16"))
        if not chosen.symmetric:
            setattr(self, zero, self._add_constant(zero, groups, "uint8"))
        mark_quantized(self)

    def _add_constant(self, name, shape, dtype):
        # Autocast would round the scales to bfloat16.
        return self.add_weight(
            name=name,
            shape=shape,
            dtype=dtype,
            initializer="zeros",
            trainable=False,
            autocast=False,
        )

    def _variable(self):
        """The variable of the weights or of their quantized values."""
        raise NotImplementedError

    def _dequantize_keras_format(self, arrays, shape):
        """Returns the weights of arrays in Keras's own format."""
        raise NotImplementedError

    @property
    def is_weight_quantized(self) -> bool:
        """Whether the weights have 8 or 4 bits."""
        return self.quantization_mode in MODES

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """The shape of the matrix, whose values int4 packs into another.

        Example:
            >>> lm.lm_head.matrix_shape
            (3072, 256)
        """
        if self.is_weight_quantized:
            return self._matrix_shape
        return tuple(self._variable().shape)

    def quantized_variables(self) -> list[keras.Variable]:
        """Returns the values, the scales and, with zero points, these.

        Returns:
            The variables in the order of a file; empty if the layer is not quantized.
        """
        if not self.is_weight_quantized:
            return []
        name = self.matrix_name
        others = [getattr(self, f"{name}_{key}", None) for key in ("scale", "zero")]
        return [self._variable(), *(v for v in others if v is not None)]

    def quantized_matrix(self) -> QuantizedMatrix | None:
        """Returns the quantized weights as arrays, on CPUs mostly without a copy.

        Returns:
            The matrix; `None` if the layer is not quantized.

        Example:
            >>> lm.quantize("int4")
            >>> lm.lm_head.quantized_matrix().bits
            8
        """
        if not self.is_weight_quantized:
            return None
        arrays = [as_numpy(v.value) for v in self.quantized_variables()]
        return QuantizedMatrix(
            self._bits, self._group_size, self._matrix_shape[1], *arrays
        )

    def assign_quantized(self, matrix: QuantizedMatrix) -> None:
        """Assigns quantized weights.

        Args:
            matrix: Weights in the format of this layer.

        Raises:
            ValueError: If they have another format or shape.
        """
        symmetric = len(self.quantized_variables()) == 2
        expected = (self._bits, self._group_size, self._matrix_shape, symmetric)
        found = (matrix.bits, matrix.group_size, matrix.shape, matrix.zeros is None)
        if found != expected:
            raise ValueError(
                f"{self.path} takes a matrix with (bits, group size, shape, symmetric) "
                f"{expected}. Received: {found}"
            )
        arrays = (matrix.values, matrix.scales, matrix.zeros)
        for variable, array in zip(self.quantized_variables(), arrays, strict=False):
            variable.assign(array)

    def round_matrix(
        self, weights: np.ndarray, chosen: MatrixFormat | None = None
    ) -> QuantizedMatrix:
        """Rounds weights to a format, by default that of this quantized layer."""
        chosen = chosen or matrix_format(policy_of(self))
        group_size = chosen.group_size_of(weights.shape[1])
        return quantize_matrix(weights, chosen.bits, group_size, chosen.symmetric)

    def dequantize_tensors(
        self, values: Tensor, scales: Tensor, zeros: Tensor | None = None
    ) -> Tensor:
        """Returns the weights of all outputs or of some, in the compute dtype."""
        return dequantize_tensor(
            *(values, scales, zeros),
            bits=self._bits,
            group_size=self._group_size,
            inputs=self._matrix_shape[1],
            dtype=self.compute_dtype,
        )

    def dequantized_tensor(self) -> Tensor:
        """Returns the weights in the compute dtype."""
        tensors = map(ops.convert_to_tensor, self.quantized_variables())
        return self.dequantize_tensors(*tensors)

    def save_quantized(
        self, store: dict[str, Any], merged: QuantizedMatrix | None = None
    ) -> None:
        """Saves quantized weights.

        Args:
            store: Variables or arrays by name; modified.
            merged: The weights with merged adapters. `None` saves the variables.
        """
        values = self.quantized_variables()
        if merged is not None:
            values = [merged.values, merged.scales, merged.zeros]
        for index, value in enumerate(values):
            if value is not None:
                store[str(index)] = value

    def check_number_of_arrays(self, number: int) -> None:
        """Checks that a file has as many arrays of this layer as its quantization.

        Args:
            number: Number of arrays without adapters.

        Raises:
            ValueError: If it is quantized and the file is not, or the opposite.
        """
        expected = len(self.quantized_variables()) or 1
        if self.built and self.quantization_mode in (None, *MODES):
            if (number > 1) != (expected > 1):
                raise ValueError(
                    f"{self.path} has {expected} variables without adapters, and the "
                    f"file has {number} of it: the file is of a model of another "
                    f"quantization. This layer's is {self.quantization_mode!r}."
                )

    def load_quantized(self, arrays: list[np.ndarray]) -> None:
        """Loads quantized weights.

        Args:
            arrays: What `save_quantized` saved, or weights in Keras's own formats,
                which are converted.

        Raises:
            ValueError: If the arrays are of another format.
        """
        if is_keras_format(arrays, self._matrix_shape[0]):
            self._warn_of_rounding(arrays)
            weights = self._dequantize_keras_format(arrays, self._matrix_shape)
            self.assign_quantized(self.round_matrix(weights))
            return
        variables = self.quantized_variables()
        expected = [(tuple(v.shape), v.dtype) for v in variables]
        found = [(array.shape, str(array.dtype)) for array in arrays]
        if found != expected:
            raise ValueError(
                f"{self.path} is quantized ({policy_of(self).name}), with arrays "
                f"{expected}, and the file has {found}: it is of a model with another "
                "quantization."
            )
        for variable, array in zip(variables, arrays, strict=True):
            variable.assign(array)

    def _warn_of_rounding(self, arrays):
        if self._bits == 4:
            warnings.warn(
                "The weights of the file are in Keras's own format for int4. They are "
                "rounded to 4 bits once more. Quantize the original model again for "
                "better weights.",
                stacklevel=2,
            )


def is_quantized(layer: keras.layers.Layer) -> bool:
    """Returns whether the weights of a layer have 8 or 4 bits.

    Example:
        >>> is_quantized(lm.backbone.final_norm)
        False
    """
    return isinstance(layer, QuantizableLayer) and layer.is_weight_quantized


def weight_policy(backbone: keras.layers.Layer) -> keras.DTypePolicy:
    """Returns the dtype policy of the projections of a backbone.

    Args:
        backbone: `OpenLlamaBackbone`.

    Example:
        >>> backbone = lm.backbone.from_config(lm.backbone.architecture())
        >>> weight_policy(backbone).name
        'float32'
    """
    return policy_of(backbone.transformer_layers[0].self_attention.query)
