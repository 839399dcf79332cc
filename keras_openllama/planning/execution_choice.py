"""How a recipe is executed: mesh, rematerialization and micro-batches."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from keras_openllama.runs.recipe import Recipe


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

    @classmethod
    def of_plan(cls, plan: Mapping[str, Any]) -> ExecutionChoice:
        """Returns the choice of a plan, see `plan.plan_pretraining`."""
        names = [field.name for field in dataclasses.fields(cls)]
        return cls(**{name: plan[name] for name in names})

    def apply_to(self, recipe: Recipe) -> Recipe:
        """Returns the recipe with this rematerialization and these micro-batches."""
        return recipe.replace(
            rematerialize=self.rematerialize, micro_batches=self.micro_batches
        )

    def __str__(self) -> str:
        mesh = " x ".join(f"{axis} {n}" for axis, n in self.mesh.items() if n > 1)
        return f"{mesh or 'one chip'}, {self.rematerialize}, {self.micro_batches}"
