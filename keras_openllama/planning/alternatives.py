"""Alternative meshes, rematerialization policies and micro-batches for a recipe."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from keras_openllama.config import REMATERIALIZATION, validate_architecture
from keras_openllama.distribution import check_mesh
from keras_openllama.planning.aot_compile import OutOfDeviceMemoryError
from keras_openllama.runs.recipe import Recipe

MAX_ATTEMPTS = 3  # Heuristic: choices to compile in search of one that fits.


@dataclasses.dataclass(frozen=True)
class ExecutionChoice:
    """How to execute a recipe on a number of chips.

    Attributes:
        mesh: sizes of the axes `"data"`, `"fsdp"` and `"model"`.
        rematerialize: a policy of `config.REMATERIALIZATION`.
        micro_batches: number of micro-batches of a step.
    """

    mesh: dict[str, int]
    rematerialize: str
    micro_batches: int

    def apply_to(self, recipe: Recipe) -> Recipe:
        """Returns the recipe with this rematerialization and these micro-batches."""
        return recipe.replace(
            rematerialize=self.rematerialize, micro_batches=self.micro_batches
        )

    def __str__(self) -> str:
        mesh = " x ".join(f"{axis} {n}" for axis, n in self.mesh.items() if n > 1)
        return f"{mesh or 'one chip'}, {self.rematerialize}, {self.micro_batches}"


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


def saved_activation_bytes(
    choice: ExecutionChoice, config: dict[str, Any], recipe: Recipe
) -> int:
    """Estimates the activations that a chip saves for the backward pass.

    Args:
        choice: mesh, rematerialization policy and micro-batches.
        config: arguments of `OpenLlamaBackbone`.
        recipe: the recipe.

    Returns:
        Bytes, according to the rematerialization policy only.
    """
    config = validate_architecture(config)
    hidden, heads = config["hidden_dim"], config["num_query_heads"]
    key_heads = config["num_key_value_heads"]
    head_dim = 128 * math.ceil(config["head_dim"] / 128)  # TPUs pad the last axis.
    wide = 2 * config["intermediate_dim"]
    numbers = {
        "full": hidden,
        "projections": 2 * hidden + 2 * (heads + key_heads) * head_dim,
    }
    numbers["products"] = numbers["projections"] + wide
    # Outputs of both norms, the activated gate, and its product with `up`.
    numbers["none"] = numbers["products"] + 2 * hidden + wide
    chips = choice.mesh["data"] * choice.mesh["fsdp"]
    sequences = recipe.batch_size // chips // choice.micro_batches
    tokens = sequences * recipe.sequence_length
    size = 2 if recipe.precision == "mixed_bfloat16" else 4
    return tokens * numbers[choice.rematerialize] * size * config["num_layers"]


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
