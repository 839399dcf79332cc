"""Architecture of a network, validated in one place, and names that modules share.

Keras is not imported, so that the `--help` of a command is fast.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from keras_openllama.utils.validation import check_integer

# Axes of a device mesh, see `distribution.make_mesh`.
MESH_AXES = ("data", "fsdp", "model")
# Projections of a decoder layer, the targets of LoRA.
PROJECTIONS = ("query", "key", "value", "output", "gate", "up", "down")
# Quantization: number of inputs that share a scale, by number of bits. `None` is all.
GROUP_SIZES = {8: None, 4: 32}
# How documents are packed into sequences, see `data.token_stream`.
PACKINGS = ("concatenate", "best_fit")
# Heuristic: logits per chunk of the loss on JAX and PyTorch, on each device; 4 bytes
# each.
LOGITS_PER_CHUNK = 16 << 20
# Rematerialization policies, and the activations that a layer saves for the backward
# pass besides its input. Each policy saves fewer than the one before.
REMATERIALIZATION = {
    "none": "all that the backward pass needs",
    "products": "query, key, value, attention, the states after it, gate and up",
    "projections": "query, key, value, attention and the states after it",
    "full": "nothing",
}
SCALING_TYPES = ("linear", "dynamic")
# The control tokens of all OpenLLaMA models, for models without a tokenizer.
START_TOKEN_ID, END_TOKEN_ID = 1, 2
# SentencePiece settings that differ between the tokenizers of OpenLLaMA v1 and v2. The
# other settings were not published.
TOKENIZER_STYLES = {
    "v1": {"remove_extra_whitespaces": True},
    "v2": {"remove_extra_whitespaces": False, "allow_whitespace_only_pieces": True},
}
# Values for the x axis of a loss plot.
LOSS_X_AXES = ("tokens", "step", "hours")
_DEFAULTS = {
    "num_key_value_heads": None,
    "head_dim": None,
    "rope_max_wavelength": 10000.0,
    "rope_scaling": None,
    "layer_norm_epsilon": 1e-6,
    "max_sequence_length": 2048,
    "initializer_std": 0.02,
}
BACKBONE_ARGUMENTS = (
    "vocabulary_size",
    "num_layers",
    "num_query_heads",
    "hidden_dim",
    "intermediate_dim",
    *_DEFAULTS,
)
_POSITIVE_NUMBERS = ("rope_max_wavelength", "layer_norm_epsilon", "initializer_std")


def validate_architecture(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Validates the arguments of `OpenLlamaBackbone` and fills in the defaults.

    Args:
        arguments: Arguments by name.

    Returns:
        Dict of all arguments, `BACKBONE_ARGUMENTS`, with Python ints and floats.

    Raises:
        ValueError: If an argument is missing, unknown or invalid.

    Example:
        >>> architecture = validate_architecture(
        ...     {
        ...         "vocabulary_size": 32000,
        ...         "num_layers": 26,
        ...         "num_query_heads": 32,
        ...         "hidden_dim": 3200,
        ...         "intermediate_dim": 8640,
        ...     }
        ... )
        >>> architecture["head_dim"], architecture["num_key_value_heads"]
        (100, 32)
    """
    required = [name for name in BACKBONE_ARGUMENTS if name not in _DEFAULTS]
    missing = [name for name in required if name not in arguments]
    unknown = [name for name in arguments if name not in BACKBONE_ARGUMENTS]
    if missing or unknown:
        raise ValueError(
            f"The architecture of a model requires {', '.join(required)}; optional "
            f"are {', '.join(_DEFAULTS)}. Missing: {', '.join(missing) or 'none'}. "
            f"Unknown: {', '.join(unknown) or 'none'}."
        )
    result = {**_DEFAULTS, **arguments}
    heads = result["num_query_heads"] = _positive_integer(result, "num_query_heads")
    if result["num_key_value_heads"] is None:
        result["num_key_value_heads"] = heads
    if result["head_dim"] is None:
        result["head_dim"] = _default_head_dim(
            _positive_integer(result, "hidden_dim"), heads
        )
    for name in BACKBONE_ARGUMENTS:
        if name in _POSITIVE_NUMBERS:
            result[name] = _positive_number(result, name)
        elif name != "rope_scaling":
            result[name] = _positive_integer(result, name)
    if heads % result["num_key_value_heads"]:
        raise ValueError(
            "`num_key_value_heads` must divide `num_query_heads`. Received: "
            f"num_key_value_heads={result['num_key_value_heads']}, "
            f"num_query_heads={heads}"
        )
    if result["head_dim"] % 2:
        raise ValueError(
            "`head_dim` must be even: rotary embedding rotates pairs of elements. "
            f"Received: head_dim={result['head_dim']}"
        )
    result["rope_scaling"] = check_rope_scaling(result["rope_scaling"])
    return result


def _default_head_dim(hidden_dim, heads):
    if hidden_dim % heads:
        raise ValueError(
            "`head_dim` is required if `num_query_heads` does not divide `hidden_dim`. "
            f"Received: hidden_dim={hidden_dim}, num_query_heads={heads}"
        )
    return hidden_dim // heads


def _positive_integer(arguments, name):
    value = arguments[name]
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # Some programs write 32.0 into JSON files.
    return check_integer(name, value)


def _positive_number(arguments, name):
    value = arguments[name]
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if isinstance(value, (str, bool)) or not 0 < number < math.inf:
        raise ValueError(
            f"`{name}` must be a positive number. Received: {name}={value!r}"
        )
    return number


def context_length(arguments: Mapping[str, Any]) -> int:
    """Returns the longest supported sequence in tokens, RoPE scaling included.

    Args:
        arguments: Arguments of `OpenLlamaBackbone`, from `validate_architecture`.

    Example:
        >>> scaling = {"rope_type": "dynamic", "factor": 2.0}
        >>> context_length({"max_sequence_length": 2048, "rope_scaling": scaling})
        4096
    """
    scaling = arguments["rope_scaling"]
    factor = 1.0 if scaling is None else scaling["factor"]
    return int(arguments["max_sequence_length"] * factor)


def check_rope_scaling(rope_scaling: Any) -> dict[str, Any] | None:
    """Validates `rope_scaling` and returns it as a plain dict, or `None`.

    Args:
        rope_scaling: `None`, or a dict with `"rope_type"` (`"linear"` or
            `"dynamic"`) and `"factor"`, a number of at least 1 by which the context
            is extended.

    Raises:
        ValueError: For any other type, factor or key.

    Example:
        >>> check_rope_scaling({"rope_type": "linear", "factor": 2})
        {'rope_type': 'linear', 'factor': 2.0}
    """
    if rope_scaling is None:
        return None
    if not isinstance(rope_scaling, dict):
        rope_scaling = {"rope_type": rope_scaling}  # Rejected below.
    unknown = set(rope_scaling) - {"rope_type", "factor"}
    rope_type = rope_scaling.get("rope_type")
    factor = rope_scaling.get("factor")
    if unknown or rope_type not in SCALING_TYPES:
        raise ValueError(
            "`rope_scaling` must be `None` or a dict like "
            '{"rope_type": "linear", "factor": 2.0}, with "rope_type" one of '
            f"{SCALING_TYPES}. Received: rope_scaling={rope_scaling}"
        )
    if not isinstance(factor, (int, float)) or not factor >= 1:
        raise ValueError(
            '`rope_scaling["factor"]` must be a number of at least 1. It extends the '
            f"context. Received: rope_scaling={rope_scaling}"
        )
    return {"rope_type": rope_type, "factor": float(factor)}
