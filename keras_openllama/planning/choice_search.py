"""Ranks all ways to execute a recipe on a slice, without compiling them."""

from __future__ import annotations

import dataclasses

from keras_openllama.config import REMATERIALIZATION
from keras_openllama.planning.cost_model import TpuChip
from keras_openllama.planning.execution_choice import ExecutionChoice
from keras_openllama.planning.step_formulas import estimate_memory, recomputed_share
from keras_openllama.presets import Preset
from keras_openllama.runs.recipe import Recipe

# Heuristic: the share of the memory that the estimate may fill.
_MEMORY_SHARE = 0.97
# From the plans for v4: matrix products reach 78 % of the peak, and each micro-batch
# waits for its collectives as long as this multiple of the time that gathering the
# weights once over two links takes. Over a whole slice, reductions are not hidden.
_EFFICIENCY = 0.78
_WAIT, _WAIT_WHOLE_SLICE = 0.9, 1.5


def ranked_choices(
    preset: Preset, recipe: Recipe, chip: TpuChip, chips: int
) -> list[ExecutionChoice]:
    """Returns the choices that should fit, the fastest first.

    Args:
        preset: the preset.
        recipe: the recipe.
        chip: the chip type.
        chips: number of chips, a power of two.

    Returns:
        Choices of mesh (data and fsdp), rematerialization and micro-batches. Of equally
        fast ones, those with the recipe's mesh come first, then those whose collectives
        span the fewest chips.

    Example:
        >>> from keras_openllama import presets
        >>> from keras_openllama.planning.cost_model import CHIPS
        >>> from keras_openllama.runs.recipe import preset_recipe
        >>> chip, recipe = CHIPS["v5e"], preset_recipe("7b")
        >>> str(ranked_choices(presets.find("7b"), recipe, chip, 256)[0])
        'data 4 x fsdp 64, products, 4'
    """
    powers = [2**k for k in range(chips.bit_length())]
    per_chip = recipe.batch_size // chips
    choices = [
        ExecutionChoice({"data": chips // n, "fsdp": n, "model": 1}, policy, micro)
        for n in powers
        for policy in REMATERIALIZATION
        for micro in (2**k for k in range(per_chip.bit_length()))
    ]
    config = preset.config
    ranked = []
    for choice in choices:
        memory = estimate_memory(choice, config, recipe, preset.parameters)
        if memory <= _MEMORY_SHARE * chip.usable_memory:
            seconds = _seconds(choice, preset, recipe, chip, chips)
            other_mesh = choice.mesh != recipe.mesh_for(chips)
            key = seconds, other_mesh, choice.mesh["fsdp"], memory
            ranked.append((*key, str(choice), choice))
    return [choice for *_, choice in sorted(ranked)]


def on_twice_the_chips(choice: ExecutionChoice) -> ExecutionChoice | None:
    """Returns a choice for twice as many chips, each with the same work and memory.

    Args:
        choice: the choice.

    Returns:
        The choice with twice the `data` and half the micro-batches, or `None` if their
        number is odd.

    Example:
        >>> choice = ExecutionChoice({"data": 1, "fsdp": 32, "model": 1}, "full", 8)
        >>> str(on_twice_the_chips(choice))
        'data 2 x fsdp 32, full, 4'
    """
    if choice.micro_batches % 2:
        return None
    mesh = {**choice.mesh, "data": 2 * choice.mesh["data"]}
    return dataclasses.replace(
        choice, mesh=mesh, micro_batches=choice.micro_batches // 2
    )


def _seconds(choice, preset, recipe, chip, chips):
    """A rough time of the step."""
    flops = 6 * preset.parameters * recipe.tokens_per_step / chips
    flops *= 1 + recomputed_share(choice, preset.config)
    gather = 2 * preset.parameters / (2 * chip.link)
    wait = _WAIT if choice.mesh["data"] > 1 else _WAIT_WHOLE_SLICE
    return flops / (_EFFICIENCY * chip.peak_flops) + (
        choice.micro_batches * wait * gather
    )
