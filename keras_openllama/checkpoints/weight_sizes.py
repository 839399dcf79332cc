"""The memory that the weights of a model need, by type. The module needs no Keras."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from keras_openllama.checkpoints.weight_names import axis_sizes, weight_specs
from keras_openllama.config import GROUP_SIZES

_SCALE_BYTES, _ZERO_BYTES = 2, 1  # float16 and uint8.


def weight_bytes(arguments: Mapping[str, Any]) -> dict[str, int]:
    """Returns the size of the weights by type.

    Args:
        arguments: Arguments of `OpenLlamaBackbone`, from `validate_architecture`.

    Returns:
        Bytes of `"bfloat16"`, and of `"int8"` and `"int4"` as `quantize` makes them of
        a model in bfloat16.

    Example:
        >>> sizes = weight_bytes(lm.backbone.architecture())
        >>> sizes["bfloat16"] == 2 * lm.count_params()
        True
    """
    totals = dict.fromkeys(("bfloat16", "int8", "int4"), 0)
    axes = axis_sizes(dict(arguments))
    for spec in weight_specs(arguments["num_layers"]):
        shape = spec.shape(axes)
        size = 2 * math.prod(shape)
        int8 = int4 = size
        if len(shape) == 2:
            int8 = int4 = quantized_bytes(shape, 8, GROUP_SIZES[8])
            if spec.path.startswith("transformer_layer"):
                int4 = quantized_bytes(shape, 4, GROUP_SIZES[4])
        for name, number in (("bfloat16", size), ("int8", int8), ("int4", int4)):
            totals[name] += number
    return totals


def quantized_bytes(
    shape: tuple[int, int], bits: int, group_size: int | None, symmetric: bool = True
) -> int:
    """Returns the size of a quantized matrix: values, scales and zero points.

    Args:
        shape: `(outputs, inputs)`.
        bits: 8 or 4.
        group_size: Number of inputs that share a scale; `None` for all inputs.
        symmetric: Whether there are no zero points.

    Example:
        >>> quantized_bytes((10, 64), bits=4, group_size=32)
        360
    """
    outputs, inputs = shape
    groups = 1 if group_size is None else math.ceil(inputs / group_size)
    per_group = _SCALE_BYTES + (0 if symmetric else _ZERO_BYTES)
    return outputs * (math.ceil(inputs * bits / 8) + groups * per_group)
