"""The memory that the weights of a model need, by type. The module needs no Keras."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from keras_openllama.checkpoints.weight_names import axis_sizes, weight_specs

_SCALE_BYTES = 2  # float16
_INT4_GROUP = 32


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
            outputs, inputs = shape
            int8 = int4 = outputs * (inputs + _SCALE_BYTES)
            if spec.path.startswith("transformer_layer"):
                groups = math.ceil(inputs / _INT4_GROUP)
                int4 = outputs * ((inputs + 1) // 2 + _SCALE_BYTES * groups)
        for name, number in (("bfloat16", size), ("int8", int8), ("int4", int4)):
            totals[name] += number
    return totals
