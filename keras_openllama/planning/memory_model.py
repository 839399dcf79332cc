"""Estimates of a step's memory without a compilation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from keras_openllama.config import validate_architecture
from keras_openllama.planning.alternatives import (
    ExecutionChoice,
    saved_activation_bytes,
)
from keras_openllama.runs.recipe import Recipe

# float32 weights and two moments; with accumulated gradients, new gradients and the
# stacked bfloat16 weights: 22. Compiled steps of 3B, 7B and 13B agree within 0.2 %.
STATE_BYTES, PEAK_BYTES = 12, 22


def parameters_per_layer(config: Mapping[str, Any]) -> int:
    """Returns the parameters of a decoder layer.

    Args:
        config: arguments of `OpenLlamaBackbone`.

    Example:
        >>> from keras_openllama import presets
        >>> parameters_per_layer(presets.find("7b").config)
        202383360
    """
    config = validate_architecture(config)
    hidden, head_dim = config["hidden_dim"], config["head_dim"]
    heads = config["num_query_heads"] + config["num_key_value_heads"]
    products = 2 * heads * head_dim + 3 * config["intermediate_dim"]
    return hidden * (products + 2)  # Two norms.


def layer_memory(
    choice: ExecutionChoice, config: dict[str, Any], recipe: Recipe, parameters: int
) -> int:
    """Estimates what layers add to the peak memory of a chip.

    Args:
        choice: mesh, rematerialization and micro-batches.
        config: arguments of `OpenLlamaBackbone`, with the number of layers.
        recipe: the recipe.
        parameters: number of parameters of these layers.

    Returns:
        Bytes of the chip's shard of states and gradients, and of saved activations.
    """
    shards = choice.mesh["fsdp"] * choice.mesh["model"]
    saved = saved_activation_bytes(choice, config, recipe) // choice.mesh["model"]
    return PEAK_BYTES * parameters // shards + saved


def estimate_memory(
    choice: ExecutionChoice, config: dict[str, Any], recipe: Recipe, parameters: int
) -> int:
    """Estimates the peak memory of a chip.

    Args:
        choice: mesh, rematerialization and micro-batches.
        config: arguments of `OpenLlamaBackbone`.
        recipe: the recipe.
        parameters: number of parameters of the model.

    Returns:
        Bytes: of `layer_memory`, of a gathered embedding and head with a gradient, and
        of the intermediate results of one layer.
    """
    hidden, wide = config["hidden_dim"], config["intermediate_dim"]
    batch_shards = choice.mesh["data"] * choice.mesh["fsdp"] * choice.micro_batches
    tokens = recipe.batch_size * recipe.sequence_length // batch_shards
    gathered = 8 * config["vocabulary_size"] * hidden
    working = 2 * tokens * (3 * wide + 6 * hidden)
    return layer_memory(choice, config, recipe, parameters) + gathered + working
