"""Plans a pretraining run on TPUs: compiles its step and estimates the cost."""

import dataclasses
import math
import os
import sys
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

from keras_openllama import presets
from keras_openllama.distribution import check_mesh
from keras_openllama.planning.alternative_plans import plan_alternatives, summary
from keras_openllama.planning.alternatives import suggest_choice_that_fits
from keras_openllama.planning.aot_compile import (
    OutOfDeviceMemoryError,
    topology_devices,
)
from keras_openllama.planning.calibration import (
    PROBABILITY,
    calibration_factor,
    expected_figures,
    points_for_chip,
    with_range,
)
from keras_openllama.planning.compilation_cache import CompilationCache
from keras_openllama.planning.cost_model import CostAssumptions, TpuChip
from keras_openllama.planning.execution_choice import ExecutionChoice
from keras_openllama.planning.step_estimate import StepEstimate, StepEstimator
from keras_openllama.runs import throughput
from keras_openllama.runs.recipe import Recipe, ResolvedRecipe
from keras_openllama.utils.types import PathLike

DEFAULT_ASSUMPTIONS = CostAssumptions()


def plan_pretraining(
    resolved: ResolvedRecipe,
    topology: str,
    mesh: dict[str, int] | None = None,
    directory: PathLike | None = None,
    assumptions: CostAssumptions = DEFAULT_ASSUMPTIONS,
    alternatives: bool = True,
    cache: CompilationCache | None = None,
    report: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Estimates time and memory of a run, and of alternatives to its settings.

    The recipe's own choice is compiled at full depth. Alternatives that can win are
    extrapolated from compilations of fewer layers; if one of them is the fastest that
    fits, it is compiled at full depth, too.

    Args:
        resolved: preset and recipe.
        topology: see `aot_compile.topology_devices`.
        mesh: sizes of the axes `"data"`, `"fsdp"` and `"model"`. Defaults to the mesh
            of the recipe.
        directory: where the HLO text of each step compiled at full depth is written.
            Defaults to a new temporary directory, which is not deleted.
        assumptions: the cost of what the compiler does not estimate.
        alternatives: whether to plan alternatives.
        cache: finished compilations; `None` compiles always.
        report: called with the plan before the alternatives are compiled.

    Returns:
        A dict that JSON can represent: `preset`, `topology`, `chips`, `mesh`,
        `rematerialize`, `micro_batches`, `tokens_per_step`; `peak_memory_bytes`,
        `memory_bytes`, `fits`; `step_seconds`, `compute_seconds`, `matmul_seconds` (a
        part of it), `kernel_seconds`, `collective_seconds`,
        `exposed_collective_seconds`; `uncosted_bytes`, the bytes written by
        instructions that are not counted, by kind; `tokens_per_second_per_chip`,
        `mfu`, `days`, `chip_hours`, as the cost model estimates them, and
        `expected_` with each of the four names, and with `_low` and `_high`, what to
        expect of a run (see `calibration`); `compile_seconds`, `cached`, `assumptions`,
        `hlo`, the path of the program's text; `extrapolated_from`, the numbers of
        layers that were compiled, empty at full depth; `best`, whether no alternative
        that fits is faster; and `alternatives`, a list of such dicts. Those that do not
        fit or cannot be faster have a `reason` instead of figures, and their `fits` is
        `None` if it is not known.

    Raises:
        OutOfDeviceMemoryError: if the step does not fit into the memory of a chip. The
            message has the nearest choice that fits.
        ValueError: if the mesh or the topology is invalid.
        RuntimeError: if the TPU compiler is not installed.

    Example:
        >>> resolved = resolve_recipe("7b_v2")  # doctest: +SKIP
        >>> plan_pretraining(resolved, "v4:4x8x8")["mfu"]  # doctest: +SKIP
    """
    chip, devices = topology_devices(topology)
    resolved = resolved.for_devices(len(devices), mesh)
    recipe, preset = resolved.recipe, presets.find(resolved.preset)
    mesh = mesh or recipe.mesh_for(len(devices))
    if math.prod(mesh.values()) != len(devices):
        # Not `data=1`, which the command line would take for its flag --data.
        sizes = " x ".join(f"{axis} {size}" for axis, size in mesh.items())
        raise ValueError(
            f"The product of the sizes of `mesh` must be the {len(devices)} chips of "
            f"{topology}. Received: {sizes}"
        )
    check_mesh(mesh, preset.config, recipe.batch_size, recipe.micro_batches)
    directory = directory or tempfile.mkdtemp(prefix="plan-")
    estimator = StepEstimator(preset.config, recipe, chip, devices, assumptions, cache)

    def plan_choice(choice, extrapolate=False):
        if extrapolate:
            estimate, path = estimator.extrapolated(choice), None
        else:
            estimate = estimator.compiled(choice)
            path = os.path.join(directory, _file_name(preset.name, topology, choice))
            with open(path, "w", encoding="utf-8") as file:
                file.write(estimate.hlo)
        figures = plan_figures(preset.config, recipe, choice, chip, estimate)
        return {
            "preset": preset.name,
            "topology": topology,
            "hlo": path,
            "assumptions": assumptions.describe(),
            **figures,
            **expected_figures({**figures, "topology": topology}),
        }

    choice = ExecutionChoice(mesh, recipe.rematerialize, recipe.micro_batches)
    print(f"Compiling for {topology}: {choice} …", file=sys.stderr, flush=True)
    try:
        plan = plan_choice(choice)
    except OutOfDeviceMemoryError as error:
        if not alternatives:
            raise
        suggestion = suggest_choice_that_fits(
            choice, preset.config, recipe, _plan_twice(plan_choice), error
        )
        raise OutOfDeviceMemoryError(
            f"{error} {suggestion}", error.excess_bytes
        ) from error
    plan |= {"best": True, "alternatives": []}
    if report:
        report(plan)
    if alternatives:
        plan_alternatives(plan, preset, recipe, plan_choice)
    return plan


def _plan_twice(plan_choice):
    """Plans at reduced depth first, which raises sooner if a choice does not fit."""

    def plan(choice):
        plan_choice(choice, extrapolate=True)
        return plan_choice(choice)

    return plan


def _file_name(preset, topology, choice):
    mesh = "x".join(str(size) for size in choice.mesh.values())
    kind = f"{choice.rematerialize}-{choice.micro_batches}"
    return f"{preset}-{topology.replace(':', '-')}-{mesh}-{kind}.hlo"


def plan_figures(
    config: dict[str, Any],
    recipe: Recipe,
    choice: ExecutionChoice,
    chip: TpuChip,
    estimate: StepEstimate,
) -> dict[str, Any]:
    """Returns the figures of a plan.

    Args:
        config: arguments of `OpenLlamaBackbone`.
        recipe: the recipe.
        choice: mesh, rematerialization and micro-batches.
        chip: the chip type.
        estimate: time and memory of the step.

    Returns:
        The choice and its figures, see `plan_pretraining`.
    """
    chips, cost = math.prod(choice.mesh.values()), estimate.cost
    rate = recipe.tokens_per_step / cost.step_seconds / chips
    flops = throughput.flops_per_token(
        estimate.parameters,
        config["num_layers"],
        config["num_query_heads"],
        config["head_dim"],
        recipe.sequence_length,
    )
    hours = recipe.steps * cost.step_seconds / 3600
    return {
        **dataclasses.asdict(choice),
        "chips": chips,
        "tokens_per_step": recipe.tokens_per_step,
        "peak_memory_bytes": estimate.peak_memory,
        "memory_bytes": chip.memory,
        "fits": estimate.peak_memory <= chip.memory,
        "step_seconds": cost.step_seconds,
        "compute_seconds": cost.compute_seconds,
        "matmul_seconds": cost.matmul_seconds,
        "kernel_seconds": cost.kernel_seconds,
        "collective_seconds": sum(cost.collective_seconds.values()),
        "exposed_collective_seconds": cost.exposed_seconds,
        "uncosted_bytes": dict(cost.uncosted_bytes),
        "tokens_per_second_per_chip": rate,
        "mfu": rate * flops / chip.peak_flops,
        "days": hours / 24,
        "chip_hours": hours * chips,
        "compile_seconds": estimate.compile_seconds,
        "cached": estimate.cached,
        "extrapolated_from": list(estimate.depths),
    }


def plan_table(plan: Mapping[str, Any], price: float | None = None) -> str:
    """Formats a plan as a table.

    Args:
        plan: see `plan_pretraining`.
        price: dollars per chip-hour, to include the price of the run.

    Returns:
        The figures of the plan and its assumptions, what is expected of a run first,
        with its range. See `comparison_table` for its alternatives.
    """
    mesh = ", ".join(f"{axis} {size}" for axis, size in plan["mesh"].items())
    step = plan["step_seconds"]

    def share(name):
        seconds = plan[f"{name}_seconds"]
        return f"{seconds:.3f} s ({seconds / step:.0%})"

    hidden = plan["collective_seconds"] - plan["exposed_collective_seconds"]
    other = plan["compute_seconds"] - plan["matmul_seconds"]
    rows = {
        "preset": plan["preset"],
        "slice": f"{plan['topology']}: {plan['chips']} chips, {mesh}",
        "expected tokens/s/chip": with_range(
            plan, "tokens_per_second_per_chip", ",.0f"
        ),
        "expected MFU (6N + 12 x layers x width x length)": with_range(
            plan, "mfu", ".1%"
        ),
        "expected days": with_range(plan, "days", ",.1f"),
        "expected chip-hours": with_range(plan, "chip_hours", ",.0f"),
        "estimated by the compiler's cycles": (
            f"{plan['tokens_per_second_per_chip']:,.0f} tokens/s/chip, MFU "
            f"{plan['mfu']:.1%}, {plan['days']:,.1f} days"
        ),
        "rematerialize, micro_batches": (
            f"{plan['rematerialize']}, {plan['micro_batches']}"
        ),
        "peak memory per chip": (
            f"{plan['peak_memory_bytes'] / 2**30:.1f} of "
            f"{plan['memory_bytes'] / 2**30:.0f} GiB"
        ),
        "estimated step": f"{step:.3f} s, {plan['tokens_per_step']:,} tokens",
        "  fusions with matrix products": share("matmul"),
        "  attention kernels": share("kernel"),
        "  other computation": f"{other:.3f} s ({other / step:.0%})",
        "  waiting for collectives": share("exposed_collective"),
        "overlapped collectives": f"{hidden:.3f} s",
        "written without a known cost": _largest_sizes(plan["uncosted_bytes"]),
        "compiled": _compiled(plan),
    }
    if price is not None:
        dollars = with_range(plan, "chip_hours", ",.0f", price)
        rows["expected price"] = f"{dollars} dollars at {price:g} per chip-hour"
    width = max(map(len, rows))
    lines = [f"{name:{width}}  {value}" for name, value in rows.items()]
    assumptions = [f"  {name}: {text}" for name, text in plan["assumptions"].items()]
    chip, note = plan["topology"].split(":")[0], "Estimated, not measured. Assumptions:"
    return "\n".join([*lines, _expectation(chip), note, *assumptions])


def _expectation(chip):
    """Where the expected figures come from."""
    factor, runs = calibration_factor(chip), points_for_chip(chip)
    where = f" on {chip}" if all(run.chip == chip for run in runs) else ""
    return (
        f"Expected: estimated speed x {factor.expected:.2f}, the geometric mean of "
        f"measured over estimated speed of {len(runs)} published runs{where}; another "
        f"run is in the range, x {factor.low:.2f} to x {factor.high:.2f}, with "
        f"probability {PROBABILITY:.0%}."
    )


def _largest_sizes(sizes):
    """The kinds that make up most of the bytes, as text."""
    kinds = sorted(sizes, key=sizes.get, reverse=True)
    shown = [kind for kind in kinds if sizes[kind] > 0.01 * sum(sizes.values())]
    return ", ".join(f"{kind} {sizes[kind] / 2**30:.1f} GiB" for kind in shown)


def _compiled(plan):
    """How the figures of a plan came about."""
    depths = " and ".join(map(str, plan["extrapolated_from"]))
    text = f"with {depths} layers and extrapolated, " if depths else ""
    text += f"in {plan['compile_seconds']:.0f} s"
    text += " (before; now read from the cache)" if plan["cached"] else ""
    return f"{text}, to {plan['hlo']}" if plan["hlo"] else text


def comparison_table(plan: Mapping[str, Any]) -> str:
    """Formats a plan and its alternatives as a table.

    Args:
        plan: see `plan_pretraining`.

    Returns:
        A line for each, with the best one marked. Empty if there are no alternatives.
    """
    if not plan["alternatives"]:
        return ""
    plans = [plan, *plan["alternatives"]]
    lines = ["mesh, rematerialize, micro-batches: GiB, estimated s/step, tokens/s/chip"]
    for each in plans:
        mark = "*" if each.get("best") else " "
        lines.append(f"{mark} {ExecutionChoice.of_plan(each)!s:44}  {summary(each)}")
    lines.append("* the fastest that fits")
    if any(each.get("extrapolated_from") for each in plans):
        lines.append(
            "~ extrapolated from compilations of fewer layers; the others are compiled "
            "at full depth"
        )
    return "\n".join(lines)
