"""Ways to run a recipe: a choice for so many chips, its neighbours, what it keeps."""

import dataclasses
import math

from keras_openllama.config import REMATERIALIZATION, validate_architecture
from keras_openllama.distribution import check_mesh
from keras_openllama.planning.aot_compile import DoesNotFit

TRIES = 3  # Ours: so many choices are compiled to find one that fits.


@dataclasses.dataclass(frozen=True)
class Choice:
    """One way to run a recipe.

    Attributes:
        mesh: dict of `"data"`, `"fsdp"`, `"model"`.
        rematerialize: string, one of `config.REMATERIALIZATION`.
        micro_batches: int.
    """

    mesh: dict
    rematerialize: str
    micro_batches: int

    def applied(self, recipe):
        """The recipe, run so."""
        return recipe.replace(
            rematerialize=self.rematerialize, micro_batches=self.micro_batches
        )

    def __str__(self):
        mesh = " x ".join(f"{axis} {n}" for axis, n in self.mesh.items() if n > 1)
        return f"{mesh or 'one chip'}, {self.rematerialize}, {self.micro_batches}"


def neighbours(choice, config, recipe):
    """Choices that differ in one thing: micro-batches, what is kept, the mesh.

    Args:
        choice: `Choice`.
        config: dict, arguments of `OpenLlamaBackbone`.
        recipe: `recipe.Recipe`.

    Returns:
        List of `Choice`, those that divide what they have to.
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


def kept_bytes(choice, config, recipe):
    """What a chip keeps for the backward pass, by the policy alone: int.

    Args:
        choice, config, recipe: see `neighbours`.
    """
    config = validate_architecture(config)
    hidden, heads = config["hidden_dim"], config["num_query_heads"]
    key_heads, head_dim = config["num_key_value_heads"], config["head_dim"]
    wide = 2 * config["intermediate_dim"]
    numbers = {
        "full": hidden,
        "projections": 2 * hidden + 2 * (heads + key_heads) * head_dim,
    }
    numbers["products"] = numbers["projections"] + wide
    # Both norms' outputs, the gate's function and its product.
    numbers["none"] = numbers["products"] + 2 * hidden + wide
    chips = choice.mesh["data"] * choice.mesh["fsdp"]
    rows = recipe.batch_size // chips // choice.micro_batches
    tokens = rows * recipe.sequence_length
    size = 2 if recipe.precision == "mixed_bfloat16" else 4
    return tokens * numbers[choice.rematerialize] * size * config["num_layers"]


def nearest_that_fits(choice, config, recipe, attempt, error):
    """Text on the choice nearest to one that does not fit, and what it would give.

    Args:
        choice, config, recipe: see `neighbours`.
        attempt: callable of a `Choice` that returns a plan or raises `DoesNotFit`.
        error: `DoesNotFit`, of the choice.

    Returns:
        String; also where none is found.
    """
    policies = list(REMATERIALIZATION)
    after = policies[policies.index(choice.rematerialize) :]
    candidates = [
        dataclasses.replace(choice, rematerialize=p, micro_batches=n)
        for p in after
        for n in (choice.micro_batches * 2**k for k in range(8))
        if (p, n) != (choice.rematerialize, choice.micro_batches)
    ]
    least = kept_bytes(choice, config, recipe) - error.excess
    candidates = [
        c
        for c in candidates
        if _divides(c, choice.mesh, config, recipe)
        and kept_bytes(c, config, recipe) <= least
    ]
    # The last one keeps least: if that does not fit, nothing does.
    for candidate in [*candidates[: TRIES - 1], *candidates[TRIES - 1 :][-1:]]:
        try:
            found = attempt(candidate)
        except DoesNotFit:
            continue
        return (
            f"The nearest that fits: --set rematerialize={candidate.rematerialize} "
            f"--set micro_batches={candidate.micro_batches}, with "
            f"{found['tokens_per_second_per_chip']:,.0f} tokens/s/chip and "
            f"{found['peak_memory_bytes'] / 2**30:.1f} GiB."
        )
    return "No other choice was found to fit; take more chips."
