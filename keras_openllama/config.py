"""Sizes of a network, checked in one place, and names that all parts share.

Keras is not imported, so that a command's `--help` answers at once.
"""

import math

# Axes of a mesh of devices, see `distribution.make_mesh`.
MESH_AXES = ("data", "fsdp", "model")
# Projections of a layer, which LoRA can adapt.
PROJECTIONS = ("query", "key", "value", "output", "gate", "up", "down")
# How documents share the sequences of a batch, see `data.token_stream`.
PACKINGS = ("concatenate", "best_fit")
# Heuristic: logits that the loss on JAX holds at once, on each device; 4 bytes each.
LOGITS_PER_CHUNK = 16 << 20
# Policies of rematerialization, from the one that saves most activations to the one
# that saves least: what a layer saves for the backward pass, beside its input.
REMATERIALIZATION = {
    "none": "whatever the backward pass needs",
    "products": "query, key, value, attention, the states after it, gate and up",
    "projections": "query, key, value, attention and the states after it",
    "full": "nothing",
}
SCALING_TYPES = ("linear", "dynamic")
# What distinguishes the tokenizers of OpenLLaMA v1 from those of v2, as settings of
# SentencePiece; neither's other flags were published.
TOKENIZER_STYLES = {
    "v1": {"remove_extra_whitespaces": True},
    "v2": {"remove_extra_whitespaces": False, "allow_whitespace_only_pieces": True},
}
# What the loss of a run is drawn against.
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
_NUMBERS = ("rope_max_wavelength", "layer_norm_epsilon", "initializer_std")


def checked(arguments):
    """The arguments of `OpenLlamaBackbone`, all stated and all possible.

    Args:
        arguments: dict, some of them by name.

    Returns:
        Dict of all `BACKBONE_ARGUMENTS`, with ints and floats of Python.

    Raises:
        ValueError: if one is missing, unknown, or has an impossible value.

    Example:

    ```python
    checked({"vocabulary_size": 32000, "num_layers": 26, "num_query_heads": 32,
             "hidden_dim": 3200, "intermediate_dim": 8640})["head_dim"]  # 100
    ```
    """
    required = [name for name in BACKBONE_ARGUMENTS if name not in _DEFAULTS]
    missing = [name for name in required if name not in arguments]
    unknown = [name for name in arguments if name not in BACKBONE_ARGUMENTS]
    if missing or unknown:
        raise ValueError(
            f"A model's architecture needs {', '.join(required)} and may have "
            f"{', '.join(_DEFAULTS)}. Missing: {', '.join(missing) or 'none'}. "
            f"Unknown: {', '.join(unknown) or 'none'}."
        )
    result = {**_DEFAULTS, **arguments}
    heads = result["num_query_heads"] = _size(result, "num_query_heads")
    if result["num_key_value_heads"] is None:
        result["num_key_value_heads"] = heads
    if result["head_dim"] is None:
        result["head_dim"] = _share(_size(result, "hidden_dim"), heads)
    for name in BACKBONE_ARGUMENTS:
        if name in _NUMBERS:
            result[name] = _number(result, name)
        elif name != "rope_scaling":
            result[name] = _size(result, name)
    if heads % result["num_key_value_heads"]:
        raise ValueError(
            "`num_key_value_heads` must divide `num_query_heads`. Received: "
            f"num_key_value_heads={result['num_key_value_heads']}, "
            f"num_query_heads={heads}"
        )
    if result["head_dim"] % 2:
        raise ValueError(
            "`head_dim` must be even, since rotary embedding turns pairs of numbers. "
            f"Received: head_dim={result['head_dim']}"
        )
    result["rope_scaling"] = check_rope_scaling(result["rope_scaling"])
    return result


def _share(hidden_dim, heads):
    if hidden_dim % heads:
        raise ValueError(
            "`head_dim` must be given where `num_query_heads` does not divide "
            f"`hidden_dim`. Received: hidden_dim={hidden_dim}, num_query_heads={heads}"
        )
    return hidden_dim // heads


def _size(arguments, name):
    value = arguments[name]
    try:
        size = int(value)
    except (TypeError, ValueError, OverflowError):
        size = 0
    if isinstance(value, (str, bool)) or size != value or size < 1:
        raise ValueError(
            f"`{name}` must be a whole number of 1 or more. Received: {name}={value!r}"
        )
    return size


def _number(arguments, name):
    value = arguments[name]
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if isinstance(value, (str, bool)) or not 0 < number < math.inf:
        raise ValueError(
            f"`{name}` must be a number above 0. Received: {name}={value!r}"
        )
    return number


def check_rope_scaling(rope_scaling):
    """Returns `rope_scaling` as a plain dict, or `None`.

    Args:
        rope_scaling: `None`, or a dict with `"rope_type"` (`"linear"` or
            `"dynamic"`) and `"factor"`, a number of at least 1: by how much the
            context is stretched.

    Raises:
        ValueError: for any other type, factor or key.
    """
    if rope_scaling is None:
        return None
    if not isinstance(rope_scaling, dict):
        rope_scaling = {"rope_type": rope_scaling}  # Which is refused below.
    unknown = set(rope_scaling) - {"rope_type", "factor"}
    rope_type = rope_scaling.get("rope_type")
    factor = rope_scaling.get("factor")
    if unknown or rope_type not in SCALING_TYPES:
        raise ValueError(
            "`rope_scaling` takes `None` or a dict like "
            '{"rope_type": "linear", "factor": 2.0}, with "rope_type" one of '
            f"{SCALING_TYPES}. Received: rope_scaling={rope_scaling}"
        )
    if not isinstance(factor, (int, float)) or not factor >= 1:
        raise ValueError(
            '`rope_scaling["factor"]` must be a number of at least 1 (the context '
            f"is stretched by it). Received: rope_scaling={rope_scaling}"
        )
    return {"rope_type": rope_type, "factor": float(factor)}
