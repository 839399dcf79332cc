"""Which alternatives cannot win against a choice that was compiled, and why."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from keras_openllama.config import validate_architecture
from keras_openllama.planning.alternatives import (
    ExecutionChoice,
    saved_activation_bytes,
)
from keras_openllama.planning.memory_model import STATE_BYTES
from keras_openllama.presets import Preset
from keras_openllama.runs.recipe import Recipe


def least_memory(
    choice: ExecutionChoice, config: dict[str, Any], recipe: Recipe, parameters: int
) -> int:
    """Returns a lower bound of the peak memory of a chip.

    Args:
        choice: mesh, rematerialization and micro-batches.
        config: arguments of `OpenLlamaBackbone`.
        recipe: the recipe.
        parameters: number of parameters of the model.

    Returns:
        Bytes of the chip's shard of weights and optimizer states, and of the saved
        activations of a micro-batch.
    """
    shards = choice.mesh["fsdp"] * choice.mesh["model"]
    states = STATE_BYTES * parameters // shards
    activations = saved_activation_bytes(choice, config, recipe)
    return states + activations // choice.mesh["model"]


def recomputed_share(choice: ExecutionChoice, config: Mapping[str, Any]) -> float:
    """Returns the matrix products that rematerialization repeats.

    Args:
        choice: mesh, rematerialization and micro-batches.
        config: arguments of `OpenLlamaBackbone`.

    Returns:
        Their FLOPs, as a share of those of the step without rematerialization: forward
        and twice as many backward.
    """
    config = validate_architecture(config)
    hidden, head_dim = config["hidden_dim"], config["head_dim"]
    heads = config["num_query_heads"], config["num_key_value_heads"]
    # Query and output, key and value.
    attention = sum(2 * hidden * number * head_dim for number in heads)
    wide = hidden * config["intermediate_dim"]
    recomputed = {"none": 0, "products": 0, "projections": 2 * wide}
    # The last product of a layer is not needed again.
    recomputed["full"] = attention + 2 * wide
    layers = config["num_layers"] * (attention + 3 * wide)
    products = layers + hidden * config["vocabulary_size"]
    repeated = config["num_layers"] * recomputed[choice.rematerialize]
    return repeated / (3 * products)


def reason_to_skip(
    choice: ExecutionChoice, plan: Mapping[str, Any], preset: Preset, recipe: Recipe
) -> str | None:
    """Returns why a choice cannot be faster than a plan, or cannot fit.

    Args:
        choice: the choice, not yet compiled.
        plan: the plan of a choice that fits, see `plan.plan_pretraining`.
        preset: the preset.
        recipe: the recipe.

    Returns:
        The reason, or `None` if the choice has to be compiled.

    Example:
        >>> from keras_openllama import presets
        >>> from keras_openllama.runs.recipe import preset_recipe
        >>> mesh = {"data": 4, "fsdp": 64, "model": 1}
        >>> plan = {
        ...     **{"mesh": mesh, "rematerialize": "products", "micro_batches": 2},
        ...     "memory_bytes": 32 << 30,
        ... }
        >>> choice = ExecutionChoice(mesh, "products", 1)
        >>> reason_to_skip(choice, plan, presets.find("7b"), preset_recipe("7b"))
        'it needs at least 46.7 of 32.0 GiB'
    """
    config, memory = preset.config, plan["memory_bytes"]
    needed = least_memory(choice, config, recipe, preset.parameters)
    if needed > memory:
        return f"it needs at least {needed / 2**30:.1f} of {memory / 2**30:.1f} GiB"
    own = ExecutionChoice(plan["mesh"], plan["rematerialize"], plan["micro_batches"])
    if choice.mesh != own.mesh or choice.micro_batches < own.micro_batches:
        return None
    if choice.micro_batches > own.micro_batches:
        # The same FLOPs, and more gathers of weights and sums of gradients.
        return "smaller micro-batches are slower, and not needed to fit"
    ratio = (1 + recomputed_share(choice, config)) / (1 + recomputed_share(own, config))
    # All else equal, and no collective waited for.
    least = plan["compute_seconds"] + plan["kernel_seconds"]
    least += (ratio - 1) * plan["matmul_seconds"]
    if least > plan["step_seconds"]:
        return f"it takes at least {least:.3f} s, if all collectives are hidden"
    return None
