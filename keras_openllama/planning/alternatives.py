"""Alternative meshes, rematerialization policies and micro-batches for a recipe."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from keras_openllama.config import REMATERIALIZATION
from keras_openllama.distribution import check_mesh
from keras_openllama.planning.aot_compile import OutOfDeviceMemoryError
from keras_openllama.planning.execution_choice import ExecutionChoice
from keras_openllama.planning.step_formulas import (
    STATE_BYTES,
    layer_memory,
    recomputed_share,
    saved_activation_bytes,
)
from keras_openllama.presets import Preset
from keras_openllama.runs.recipe import Recipe

MAX_ATTEMPTS = 3  # Heuristic: choices to compile in search of one that fits.


def neighboring_choices(
    choice: ExecutionChoice, config: dict[str, Any], recipe: Recipe
) -> list[ExecutionChoice]:
    """Returns choices that differ in micro-batches, rematerialization or mesh.

    Args:
        choice: the choice to vary, one value at a time.
        config: arguments of `OpenLlamaBackbone`.
        recipe: the recipe.

    Returns:
        The choices for which all sizes divide evenly.

    Example:
        >>> from keras_openllama import presets
        >>> from keras_openllama.runs.recipe import preset_recipe
        >>> choice = ExecutionChoice({"data": 4, "fsdp": 64, "model": 1}, "full", 2)
        >>> config = presets.find("7b").config
        >>> neighbors = neighboring_choices(choice, config, preset_recipe("7b"))
        >>> [neighbor.micro_batches for neighbor in neighbors[:2]]
        [4, 1]
    """
    policies, mesh = list(REMATERIALIZATION), choice.mesh
    position = policies.index(choice.rematerialize)
    changes = [
        {"micro_batches": 2 * choice.micro_batches},
        {"micro_batches": choice.micro_batches // 2},
        *({"rematerialize": p} for p in policies[max(1, position - 1) : position + 2]),
        {"mesh": {**mesh, "data": mesh["data"] // 2, "fsdp": 2 * mesh["fsdp"]}},
        {"mesh": {**mesh, "data": 2 * mesh["data"], "fsdp": mesh["fsdp"] // 2}},
    ]
    found = [dataclasses.replace(choice, **change) for change in changes]
    return [c for c in found if c != choice and _divides(c, mesh, config, recipe)]


def _divides(choice, mesh, config, recipe):
    sizes = choice.mesh.values()
    if math.prod(sizes) != math.prod(mesh.values()) or choice.micro_batches < 1:
        return False
    if recipe.batch_size % choice.micro_batches:
        return False
    try:
        check_mesh(choice.mesh, config, recipe.batch_size, choice.micro_batches)
    except ValueError:
        return False
    return True


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
    # Of the peak memory, what is certain: states and saved activations.
    needed = layer_memory(choice, config, recipe, preset.parameters, STATE_BYTES)
    if needed > memory:
        return f"it needs at least {needed / 2**30:.1f} of {memory / 2**30:.1f} GiB"
    own = ExecutionChoice.of_plan(plan)
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


def suggest_choice_that_fits(
    choice: ExecutionChoice,
    config: dict[str, Any],
    recipe: Recipe,
    plan_choice: Callable[[ExecutionChoice], dict[str, Any]],
    error: OutOfDeviceMemoryError,
) -> str:
    """Finds the choice that fits and is nearest to one that does not.

    Args:
        choice: the choice that does not fit.
        config: arguments of `OpenLlamaBackbone`.
        recipe: the recipe.
        plan_choice: returns the plan of a choice, or raises `OutOfDeviceMemoryError`.
        error: the error of `choice`.

    Returns:
        A sentence with the choice, its speed and its memory, or that there is none.
    """
    policies = list(REMATERIALIZATION)
    no_more_saved = policies[policies.index(choice.rematerialize) :]
    candidates = [
        dataclasses.replace(choice, rematerialize=p, micro_batches=n)
        for p in no_more_saved
        for n in (choice.micro_batches * 2**k for k in range(8))
        if (p, n) != (choice.rematerialize, choice.micro_batches)
    ]
    limit = saved_activation_bytes(choice, config, recipe) - error.excess_bytes
    candidates = [
        c
        for c in candidates
        if _divides(c, choice.mesh, config, recipe)
        and saved_activation_bytes(c, config, recipe) <= limit
    ]
    # The last one saves the fewest activations: if it does not fit, none does.
    first = candidates[: MAX_ATTEMPTS - 1]
    for candidate in [*first, *candidates[len(first) :][-1:]]:
        try:
            plan = plan_choice(candidate)
        except OutOfDeviceMemoryError:
            continue
        return (
            f"The nearest choice that fits is --set rematerialize="
            f"{candidate.rematerialize} --set micro_batches={candidate.micro_batches}, "
            f"with {plan['tokens_per_second_per_chip']:,.0f} tokens/s/chip and "
            f"{plan['peak_memory_bytes'] / 2**30:.1f} GiB."
        )
    return "No other choice was found that fits. Use more chips."
