"""Plans of the alternatives to a choice: skipped, extrapolated, or compiled."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from keras_openllama.planning.alternatives import neighboring_choices, reason_to_skip
from keras_openllama.planning.aot_compile import OutOfDeviceMemoryError
from keras_openllama.planning.execution_choice import ExecutionChoice
from keras_openllama.presets import Preset
from keras_openllama.runs.recipe import Recipe


def plan_alternatives(
    plan: dict[str, Any],
    preset: Preset,
    recipe: Recipe,
    plan_choice: Callable[..., dict[str, Any]],
) -> None:
    """Plans the neighbors of a choice; prints each, and the time left, to stderr.

    Args:
        plan: the plan of the choice, see `plan.plan_pretraining`. Its `alternatives`
            and `best` are set.
        preset: the preset.
        recipe: the recipe.
        plan_choice: callable `(choice, extrapolate)` that returns a plan, or raises
            `OutOfDeviceMemoryError`.
    """
    own = ExecutionChoice.of_plan(plan)
    choices = neighboring_choices(own, preset.config, recipe)
    plans = {}
    for choice in choices:
        reason = reason_to_skip(choice, plan, preset, recipe)
        if reason:
            plans[str(choice)] = _without_figures(choice, None, reason)
    remaining = [choice for choice in choices if str(choice) not in plans]
    progress = _Progress(plan, len(remaining))
    for choice in remaining:
        with_figures = _plan_or_reason(plan_choice, choice, progress, True)
        plans[str(choice)] = with_figures
    # An extrapolated winner is compiled at full depth; it may lose by that.
    best = _fastest([plan, *plans.values()])
    while best["extrapolated_from"]:
        choice = next(c for c in remaining if plans[str(c)] is best)
        plans[str(choice)] = _plan_or_reason(plan_choice, choice, progress, False)
        best = _fastest([plan, *plans.values()])
    plan["alternatives"] = [plans[str(choice)] for choice in choices]
    for each in [plan, *plan["alternatives"]]:
        each["best"] = each is best


def _fastest(plans):
    fitting = [each for each in plans if each["fits"]]
    return min(fitting, key=lambda each: each["step_seconds"])


def _without_figures(choice, fits, reason):
    return {**dataclasses.asdict(choice), "fits": fits, "reason": reason}


def _plan_or_reason(plan_choice, choice, progress, extrapolate):
    """The plan of a choice, or the reason why it does not fit."""
    progress.start(choice, extrapolate)
    try:
        found = plan_choice(choice, extrapolate=extrapolate)
    except OutOfDeviceMemoryError as error:
        found = _without_figures(choice, False, str(error))
    progress.finish(found, extrapolate)
    return found


def summary(plan: Mapping[str, Any]) -> str:
    """Formats memory and speed of a plan, or why it has none.

    Args:
        plan: see `plan.plan_pretraining`.

    Example:
        >>> summary({"fits": None, "reason": "needs at least 46.7 of 30.8 GiB"})
        'skipped: needs at least 46.7 of 30.8 GiB'
    """
    if "reason" in plan:
        return "does not fit" if plan["fits"] is False else f"skipped: {plan['reason']}"
    return (
        f"{plan['peak_memory_bytes'] / 2**30:5.1f}  {plan['step_seconds']:8.3f}  "
        f"{plan['tokens_per_second_per_chip']:6,.0f}"
        f"{'  ~' if plan['extrapolated_from'] else ''}"
    )


class _Progress:
    """Prints what is compiled, and about how long the rest takes.

    Args:
        plan: the plan that was compiled first.
        number: how many alternatives follow.
    """

    def __init__(self, plan, number):
        self.plan, self.left, self.seconds = plan, number, []

    def start(self, choice, extrapolate):
        self.began = time.monotonic()
        # Heuristic, until one is finished: two small programs take as long as a large.
        expected = self.plan["compile_seconds"]
        if self.seconds:
            expected = sum(self.seconds) / len(self.seconds)
        left = expected * self.left if extrapolate else self.plan["compile_seconds"]
        depth = "with fewer layers" if extrapolate else "at full depth"
        print(
            f"Compiling for {self.plan['topology']}: {choice} {depth} "
            f"(about {_duration(left)} left) …",
            file=sys.stderr,
            flush=True,
        )

    def finish(self, found, extrapolate):
        if extrapolate:
            self.left -= 1
            self.seconds.append(time.monotonic() - self.began)
        print(f"  {summary(found)}", file=sys.stderr, flush=True)


def _duration(seconds):
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
