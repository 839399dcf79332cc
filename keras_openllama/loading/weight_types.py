"""The dtype and the quantization that weights are loaded with."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import keras

from keras_openllama.checkpoints import weight_names
from keras_openllama.quantization.policies import WeightQuantizationPolicy
from keras_openllama.quantization.settings import resolve_config

if TYPE_CHECKING:
    from keras_openllama.checkpoints.tensors import StoredTensor
    from keras_openllama.quantization.policies import MatrixFormat

_ROLES = {"token_embedding": "embedding", "lm_head": "head"}


@dataclasses.dataclass(frozen=True)
class WeightTypes:
    """What a user asks for with `dtype` and `quantization`.

    Attributes:
        dtype: Dtype or dtype policy. `None` is Keras's global policy.
        quantization: `"int8"`, `"int4"` or a `keras.quantizers.QuantizationConfig`;
            `None` for floating-point weights; `"auto"` for weights as in the files.

    Raises:
        ValueError: If `quantization` is invalid, or is in `dtype`.

    Example:
        >>> WeightTypes("bfloat16", "int4").config.bits
        4
    """

    dtype: str | keras.DTypePolicy | None = None
    quantization: Any = "auto"

    def __post_init__(self) -> None:
        _ = self.config  # Raises an error if the quantization is invalid.

    @property
    def config(self) -> Any:
        """The `WeightQuantizationConfig`; `None` without quantization and for "auto".

        Raises:
            ValueError: If `quantization` is invalid.
        """
        value = self.quantization
        if value is None or (isinstance(value, str) and value == "auto"):
            return None
        is_config = isinstance(value, keras.quantizers.QuantizationConfig)
        mode = value.mode if is_config else value
        if mode not in ("int8", "int4", "gptq", "awq"):
            raise ValueError(
                "`quantization` must be 'auto', None, 'int8', 'int4', or a "
                "`keras.quantizers.QuantizationConfig` of int8 or int4. Received: "
                f"quantization={value!r}"
            )
        return resolve_config(None, value) if is_config else resolve_config(value)

    def float_policy(self) -> keras.DTypePolicy:
        """Returns the dtype policy of the layers that are not quantized.

        Raises:
            ValueError: If the policy is quantized.
        """
        dtype = keras.config.dtype_policy() if self.dtype is None else self.dtype
        policy = keras.dtype_policies.get(dtype)
        if policy.quantization_mode is not None:
            raise ValueError(
                "`dtype` must be a floating-point dtype or policy. Quantize the model "
                "with `quantization`, such as quantization='int8'. Received: "
                f"dtype={policy.name!r}"
            )
        return policy

    def policy(
        self,
        arguments: Mapping[str, Any],
        stored: Mapping[str, MatrixFormat] | None = None,
    ) -> keras.DTypePolicy:
        """Returns the dtype policy of a model, a map if layers are quantized.

        Args:
            arguments: Arguments of `OpenLlamaBackbone`.
            stored: See `formats`.
        """
        policy = self.float_policy()
        formats = self.formats(arguments, stored)
        if not formats:
            return policy
        name = policy.name
        return keras.dtype_policies.DTypePolicyMap(
            policy,
            {
                layer: WeightQuantizationPolicy(
                    chosen.mode, name, chosen.group_size, chosen.symmetric
                )
                for layer, chosen in formats.items()
            },
        )

    def formats(
        self,
        arguments: Mapping[str, Any],
        stored: Mapping[str, MatrixFormat] | None = None,
    ) -> dict[str, MatrixFormat]:
        """Returns how each layer that is quantized is, by path.

        Args:
            arguments: Arguments of `OpenLlamaBackbone`.
            stored: The formats of the layers that are quantized in the files, see
                `stored_formats`.

        Example:
            >>> arguments = lm.backbone.architecture()
            >>> WeightTypes(None, "int4").formats(arguments)["lm_head"]
            MatrixFormat(bits=8, group_size=None, symmetric=True)
        """
        stored, formats = stored or {}, {}
        for row in weight_names.weight_specs(arguments["num_layers"]):
            layer = row.path.rpartition("/")[0]
            if len(row.axes) != 2:
                continue
            if self.config is not None:
                chosen = self.config.format_for(_ROLES.get(layer, "projection"))
            elif self.quantization is None:
                chosen = None
            else:
                chosen = stored.get(layer)
            if chosen is not None:
                formats[layer] = chosen
        return formats


def stored_formats(tensors: Mapping[str, StoredTensor]) -> dict[str, MatrixFormat]:
    """Returns how layers are quantized in files, by path.

    Args:
        tensors: The tensors of the files by variable path. Those with an attribute
            `format` that is not `None` are quantized, see `QuantizedTensor`.
    """
    found = {path: getattr(tensor, "format", None) for path, tensor in tensors.items()}
    return {
        path.rpartition("/")[0]: chosen
        for path, chosen in found.items()
        if chosen is not None
    }
