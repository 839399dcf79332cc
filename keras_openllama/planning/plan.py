"""Plans a pretraining run on TPUs: compiles its step and estimates the cost."""

import dataclasses
import math
import os
import sys
import tempfile
from collections.abc import Mapping
from typing import Any

from keras_openllama import presets
from keras_openllama.distribution import check_mesh
from keras_openllama.planning.alternatives import (
    ExecutionChoice,
    neighboring_choices,
    suggest_choice_that_fits,
)
from keras_openllama.planning.aot_compile import (
    OutOfDeviceMemoryError,
    compile_step_ahead_of_time,
    topology_devices,
)
from keras_openllama.planning.cost_model import CostAssumptions, estimate_cost
from keras_openllama.runs import throughput
from keras_openllama.runs.recipe import ResolvedRecipe
from keras_openllama.utils.types import PathLike

DEFAULT_ASSUMPTIONS = CostAssumptions()


def plan_pretraining(
    resolved: ResolvedRecipe,
    topology: str,
    mesh: dict[str, int] | None = None,
    directory: PathLike | None = None,
    assumptions: CostAssumptions = DEFAULT_ASSUMPTIONS,
    alternatives: bool = True,
) -> dict[str, Any]:
    """Estimates time and memory of a run, and of alternatives to its settings.

    Args:
        resolved: preset and recipe.
        topology: see `aot_compile.topology_devices`.
        mesh: sizes of the axes `"data"`, `"fsdp"` and `"model"`. Defaults to the mesh
            of the recipe.
        directory: where the HLO text of each compiled step is written. Defaults to a
            new temporary directory, which is not deleted.
        assumptions: the cost of what the compiler does not estimate.
        alternatives: whether to plan alternatives, each of which takes a minute to
            compile.

    Returns:
        A dict that JSON can represent: `preset`, `topology`, `chips`, `mesh`,
        `rematerialize`, `micro_batches`, `tokens_per_step`; `peak_memory_bytes`,
        `memory_bytes`, `fits`; `step_seconds`, `compute_seconds`, `matmul_seconds` (a
        part of it), `kernel_seconds`, `collective_seconds`,
        `exposed_collective_seconds`; `uncosted_bytes`, the bytes written by
        instructions that are not counted, by kind; `tokens_per_second_per_chip`,
        `mfu`, `days`, `chip_hours`; `compile_seconds`, `assumptions`, `hlo`; `best`,
        whether no alternative that fits is faster; and `alternatives`, a list of such
        dicts, in which those that do not fit have a `reason`.

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
    check_mesh(mesh, preset.config, recipe.batch_size, recipe.micro_batches)
    directory = directory or tempfile.mkdtemp(prefix="plan-")

    def plan_choice(choice):
        print(f"Compiling for {topology}: {choice} …", file=sys.stderr, flush=True)
        applied = choice.apply_to(recipe)
        step = compile_step_ahead_of_time(preset.config, applied, choice.mesh, devices)
        path = os.path.join(directory, _file_name(preset.name, topology, choice))
        with open(path, "w", encoding="utf-8") as file:
            file.write(step.hlo)
        cost = estimate_cost(step.hlo, chip, assumptions)
        return {
            "preset": preset.name,
            "topology": topology,
            "hlo": path,
            "assumptions": assumptions.describe(),
            **_figures(preset.config, applied, choice, chip, step, cost),
        }

    choice = ExecutionChoice(mesh, recipe.rematerialize, recipe.micro_batches)
    try:
        plan = plan_choice(choice)
    except OutOfDeviceMemoryError as error:
        if not alternatives:
            raise
        suggestion = suggest_choice_that_fits(
            choice, preset.config, recipe, plan_choice, error
        )
        raise OutOfDeviceMemoryError(
            f"{error} {suggestion}", error.excess_bytes
        ) from error
    neighbors = (
        neighboring_choices(choice, preset.config, recipe) if alternatives else []
    )
    plan["alternatives"] = [
        _plan_or_reason(plan_choice, neighbor) for neighbor in neighbors
    ]
    plans = [plan, *plan["alternatives"]]
    fitting = [each for each in plans if each["fits"]]
    best = min(fitting, key=lambda each: each["step_seconds"], default=None)
    for each in plans:
        each["best"] = each is best
    return plan


def _file_name(preset, topology, choice):
    mesh = "x".join(str(size) for size in choice.mesh.values())
    kind = f"{choice.rematerialize}-{choice.micro_batches}"
    return f"{preset}-{topology.replace(':', '-')}-{mesh}-{kind}.hlo"


def _plan_or_reason(plan_choice, choice):
    """The plan of a choice, or the reason why it does not fit."""
    try:
        return plan_choice(choice)
    except OutOfDeviceMemoryError as error:
        return {**dataclasses.asdict(choice), "fits": False, "reason": str(error)}


def _figures(config, recipe, choice, chip, step, cost):
    """The figures of a plan, see `plan_pretraining`."""
    chips = math.prod(choice.mesh.values())
    rate = recipe.tokens_per_step / cost.step_seconds / chips
    flops = throughput.flops_per_token(
        step.parameters,
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
        "peak_memory_bytes": step.peak_memory,
        "memory_bytes": chip.memory,
        "fits": step.peak_memory <= chip.memory,
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
        "compile_seconds": step.compile_seconds,
    }


def plan_table(plan: Mapping[str, Any]) -> str:
    """Formats a plan as a table.

    Args:
        plan: see `plan_pretraining`.

    Returns:
        The figures of the plan, its alternatives and its assumptions.
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
        "rematerialize, micro_batches": (
            f"{plan['rematerialize']}, {plan['micro_batches']}"
        ),
        "peak memory per chip": (
            f"{plan['peak_memory_bytes'] / 2**30:.1f} of "
            f"{plan['memory_bytes'] / 2**30:.0f} GiB"
        ),
        "step": f"{step:.3f} s, {plan['tokens_per_step']:,} tokens",
        "  fusions with matrix products": share("matmul"),
        "  attention kernels": share("kernel"),
        "  other computation": f"{other:.3f} s ({other / step:.0%})",
        "  waiting for collectives": share("exposed_collective"),
        "overlapped collectives": f"{hidden:.3f} s",
        "written without a known cost": _largest_sizes(plan["uncosted_bytes"]),
        "tokens/s/chip": f"{plan['tokens_per_second_per_chip']:,.0f}",
        "MFU (6N + 12 x layers x width x length)": f"{plan['mfu']:.1%}",
        "full run": (f"{plan['days']:.1f} days, {plan['chip_hours']:,.0f} chip-hours"),
        "compiled": f"in {plan['compile_seconds']:.0f} s, to {plan['hlo']}",
    }
    width = max(map(len, rows))
    lines = [f"{name:{width}}  {value}" for name, value in rows.items()]
    if plan["alternatives"]:
        lines += _comparison([plan, *plan["alternatives"]])
    assumptions = [f"  {name}: {text}" for name, text in plan["assumptions"].items()]
    return "\n".join([*lines, "Estimated, not measured. Assumptions:", *assumptions])


def _largest_sizes(sizes):
    """The kinds that make up most of the bytes, as text."""
    kinds = sorted(sizes, key=sizes.get, reverse=True)
    shown = [kind for kind in kinds if sizes[kind] > 0.01 * sum(sizes.values())]
    return ", ".join(f"{kind} {sizes[kind] / 2**30:.1f} GiB" for kind in shown)


def _comparison(plans):
    """Lines that compare plans, with the best one marked."""
    lines = ["", "mesh, rematerialize, micro-batches: GiB, s/step, tokens/s/chip"]
    for each in plans:
        names = [field.name for field in dataclasses.fields(ExecutionChoice)]
        choice = ExecutionChoice(**{name: each[name] for name in names})
        mark = "*" if each["best"] else " "
        if "reason" in each:
            numbers = "does not fit"
        else:
            numbers = (
                f"{each['peak_memory_bytes'] / 2**30:5.1f}  "
                f"{each['step_seconds']:8.3f}  "
                f"{each['tokens_per_second_per_chip']:6,.0f}"
            )
        lines.append(f"{mark} {choice!s:44}  {numbers}")
    return [*lines, "* the fastest that fits", ""]
