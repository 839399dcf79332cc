"""The dtype policy of a quantized layer, which says how its weights are stored."""

from __future__ import annotations

import dataclasses
from typing import Any

import keras

from keras_openllama.backend.keras_private import AnyFloatPolicy
from keras_openllama.quantization.quantized_matrix import check_format
from keras_openllama.utils.validation import check_integer

MODES = ("int8", "int4")


@dataclasses.dataclass(frozen=True)
class MatrixFormat:
    """How a matrix of weights is quantized.

    Attributes:
        bits: 8 or 4.
        group_size: number of inputs that share a scale; `None` for all inputs.
        symmetric: whether there are no zero points.

    Raises:
        ValueError: If there is no such format.

    Example:
        >>> MatrixFormat(bits=4, group_size=32).mode
        'int4'
    """

    bits: int
    group_size: int | None
    symmetric: bool = True

    def __post_init__(self) -> None:
        if self.group_size is not None:
            check_integer("group_size", self.group_size)
        check_format(self.bits, self.group_size or 1, self.symmetric)

    @property
    def mode(self) -> str:
        """The quantization mode of Keras, `"int8"` or `"int4"`."""
        return f"int{self.bits}"

    def group_size_of(self, inputs: int) -> int:
        """Returns the group size of a matrix with a number of inputs.

        Example:
            >>> MatrixFormat(bits=8, group_size=None).group_size_of(inputs=100)
            100
        """
        return inputs if self.group_size is None else min(self.group_size, inputs)


# What Keras's own format of int4 is converted to, almost exactly: its groups are not
# of weights of one output, so that rounding them to 4 bits again would add an error.
KERAS_INT4_REPLACEMENT = MatrixFormat(bits=8, group_size=32)


@keras.saving.register_keras_serializable(package="keras_openllama")
class WeightQuantizationPolicy(
    AnyFloatPolicy, keras.dtype_policies.QuantizedDTypePolicy
):
    """The dtype policy of a layer whose weights are quantized, by groups of inputs.

    Args:
        mode: `"int8"` or `"int4"`.
        source_name: name of the floating-point policy; `None` is Keras's global policy.
        group_size: number of inputs that share a scale; `None` for all inputs.
        symmetric: whether there are no zero points.

    Raises:
        ValueError: If there is no such format.

    Example:
        >>> policy = WeightQuantizationPolicy("int4", "bfloat16", group_size=32)
        >>> policy.name, policy.compute_dtype
        ('int4/32_from_bfloat16', 'bfloat16')
    """

    def __init__(
        self,
        mode: str,
        source_name: str | None = None,
        group_size: int | None = None,
        symmetric: bool = True,
    ) -> None:
        super().__init__(mode, source_name)
        bits = {"int8": 8, "int4": 4}.get(mode)
        if bits is None:
            raise ValueError(f"`mode` must be one of {MODES}. Received: mode={mode!r}")
        self.format = MatrixFormat(bits, group_size, symmetric)
        group = "" if group_size is None else f"/{group_size}"
        zeros = "" if symmetric else "/zeros"
        self._name = self._name.replace(mode, f"{mode}{group}{zeros}", 1)

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments of the constructor."""
        return {
            **super().get_config(),
            "group_size": self.format.group_size,
            "symmetric": self.format.symmetric,
        }


def policy_of(layer: keras.layers.Layer) -> keras.DTypePolicy:
    """Returns the dtype policy of a layer, which may be an entry of a policy map.

    Example:
        >>> policy_of(keras.layers.Dense(1, dtype="bfloat16")).name
        'bfloat16'
    """
    policy = layer.dtype_policy
    if isinstance(policy, keras.dtype_policies.DTypePolicyMap):
        return policy[layer.path]
    return policy


def matrix_format(policy: keras.DTypePolicy) -> MatrixFormat | None:
    """Returns how the weights of a layer with a policy are quantized.

    Args:
        policy: A dtype policy, which may be one of Keras's own for int8 and int4.

    Returns:
        The format; `None` for another policy.

    Example:
        >>> matrix_format(keras.dtype_policies.get("int8_from_float32"))
        MatrixFormat(bits=8, group_size=None, symmetric=True)
    """
    if isinstance(policy, WeightQuantizationPolicy):
        return policy.format
    by_mode = {"int8": MatrixFormat(8, None), "int4": KERAS_INT4_REPLACEMENT}
    return by_mode.get(policy.quantization_mode)


def with_source(policy: keras.DTypePolicy, source_name: str) -> keras.DTypePolicy:
    """Returns a quantized policy with another dtype of computations.

    Args:
        policy: A quantized dtype policy, also one of Keras's own.
        source_name: Name of the floating-point policy.

    Example:
        >>> policy = keras.dtype_policies.get("int8_from_float32")
        >>> with_source(policy, "bfloat16").name
        'int8_from_bfloat16'
    """
    return type(policy).from_config({**policy.get_config(), "source_name": source_name})
