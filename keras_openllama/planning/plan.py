"""What a run would cost on TPUs, without one: its step is compiled, and priced."""

import dataclasses
import math
import os
import sys
import tempfile

from keras_openllama import presets
from keras_openllama.distribution import check_mesh
from keras_openllama.planning.alternatives import Choice, nearest_that_fits, neighbours
from keras_openllama.planning.aot_compile import DoesNotFit, compiled_step, devices_of
from keras_openllama.planning.cost_model import Prices, price
from keras_openllama.runs import throughput

DEFAULT_PRICES = Prices()


def plan(
    resolved,
    topology,
    mesh=None,
    directory=None,
    prices=DEFAULT_PRICES,
    alternatives=True,
):
    """What a run would cost, and its neighbours.

    Args:
        resolved: `recipe.ResolvedRecipe`.
        topology: string, see `aot_compile.devices_of`.
        mesh: dict of `"data"`, `"fsdp"`, `"model"`; the recipe's if `None`.
        directory: string, where the programs' texts are kept; a new one if `None`.
        prices: `cost_model.Prices`.
        alternatives: whether to plan alternatives, each of which takes a minute to
            compile.

    Returns:
        Dict that JSON can hold: `preset`, `topology`, `chips`, `mesh`, `rematerialize`,
        `micro_batches`, `tokens_per_step`; `peak_memory_bytes`, `memory_bytes`, `fits`;
        `step_seconds`, `compute_seconds`, of that `matmul_seconds`, `kernel_seconds`,
        `collective_seconds`, `exposed_collective_seconds`;
        `tokens_per_second_per_chip`, `mfu`, `days`, `chip_hours`; `compile_seconds`,
        `assumptions`, `hlo`; `best`, whether no neighbour that fits is faster; and
        `alternatives`, a list of such dicts, those that do not fit with `reason`.

    Raises:
        DoesNotFit: if a chip has too little memory; it names the nearest that fits.
        ValueError: if the mesh does not fit, or the topology is not known.
        RuntimeError: if there is no compiler.

    Example:

    ```python
    plan(resolve("7b_v2"), "v4:4x8x8", alternatives=False)["tokens_per_second_per_chip"]
    ```
    """
    chip, devices = devices_of(topology)
    resolved = resolved.for_devices(len(devices), mesh)
    recipe, preset = resolved.recipe, presets.find(resolved.preset)
    mesh = mesh or recipe.mesh_for(len(devices))
    check_mesh(mesh, preset.config, recipe.batch_size, recipe.micro_batches)
    directory = directory or tempfile.mkdtemp(prefix="plan-")

    def attempt(choice):
        print(f"Compiling for {topology}: {choice} …", file=sys.stderr, flush=True)
        run = choice.applied(recipe)
        step = compiled_step(preset.config, run, choice.mesh, devices)
        path = os.path.join(directory, _file_name(preset.name, topology, choice))
        with open(path, "w", encoding="utf-8") as file:
            file.write(step.text)
        cost = price(step.text, chip, prices)
        shared = {"preset": preset.name, "topology": topology, "hlo": path}
        return shared | _told(preset.config, run, choice, chip, step, cost, prices)

    choice = Choice(mesh, recipe.rematerialize, recipe.micro_batches)
    try:
        found = attempt(choice)
    except DoesNotFit as error:
        if not alternatives:
            raise
        nearest = nearest_that_fits(choice, preset.config, recipe, attempt, error)
        raise DoesNotFit(f"{error} {nearest}", error.excess) from error
    around = neighbours(choice, preset.config, recipe) if alternatives else []
    found["alternatives"] = [_attempted(attempt, other) for other in around]
    fitting = [p for p in (found, *found["alternatives"]) if p["fits"]]
    best = min(fitting, key=lambda p: p["step_seconds"], default=None)
    for each in (found, *found["alternatives"]):
        each["best"] = each is best
    return found


def _file_name(preset, topology, choice):
    mesh = "x".join(str(size) for size in choice.mesh.values())
    kind = f"{choice.rematerialize}-{choice.micro_batches}"
    return f"{preset}-{topology.replace(':', '-')}-{mesh}-{kind}.hlo"


def _attempted(attempt, choice):
    """A plan, or why there is none."""
    try:
        return attempt(choice)
    except DoesNotFit as error:
        return {**dataclasses.asdict(choice), "fits": False, "reason": str(error)}


def _told(config, recipe, choice, chip, step, cost, prices):
    """The figures of a plan, see `plan`."""
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
        "peak_memory_bytes": step.memory,
        "memory_bytes": chip.memory,
        "fits": step.memory <= chip.memory,
        "step_seconds": cost.step_seconds,
        "compute_seconds": cost.compute_seconds,
        "matmul_seconds": cost.matmul_seconds,
        "kernel_seconds": cost.kernel_seconds,
        "collective_seconds": sum(cost.collective_seconds.values()),
        "exposed_collective_seconds": cost.exposed_seconds,
        "tokens_per_second_per_chip": rate,
        "mfu": rate * flops / chip.peak_flops,
        "days": hours / 24,
        "chip_hours": hours * chips,
        "compile_seconds": step.seconds,
        "assumptions": prices.to_json(),
    }


def table(found):
    """A plan as lines to print.

    Args:
        found: dict, see `plan`.
    """
    mesh = ", ".join(f"{axis} {size}" for axis, size in found["mesh"].items())
    step = found["step_seconds"]

    def share(name):
        seconds = found[f"{name}_seconds"]
        return f"{seconds:.3f} s ({seconds / step:.0%})"

    hidden = found["collective_seconds"] - found["exposed_collective_seconds"]
    other = found["compute_seconds"] - found["matmul_seconds"]
    rows = {
        "preset": found["preset"],
        "slice": f"{found['topology']}: {found['chips']} chips, {mesh}",
        "rematerialize, micro_batches": (
            f"{found['rematerialize']}, {found['micro_batches']}"
        ),
        "peak memory of a chip": (
            f"{found['peak_memory_bytes'] / 2**30:.1f} of "
            f"{found['memory_bytes'] / 2**30:.0f} GiB"
        ),
        "a step": f"{step:.3f} s, {found['tokens_per_step']:,} tokens",
        "  around matrix products": share("matmul"),
        "  attention kernels": share("kernel"),
        "  other computation": f"{other:.3f} s ({other / step:.0%})",
        "  waiting for collectives": share("exposed_collective"),
        "collectives hidden by these": f"{hidden:.3f} s",
        "tokens/s/chip": f"{found['tokens_per_second_per_chip']:,.0f}",
        "MFU (6N + 12 x layers x width x length)": f"{found['mfu']:.1%}",
        "the whole run": (
            f"{found['days']:.1f} days, {found['chip_hours']:,.0f} chip-hours"
        ),
        "compiled in": f"{found['compile_seconds']:.0f} s, into {found['hlo']}",
    }
    width = max(map(len, rows))
    lines = [f"{name:{width}}  {value}" for name, value in rows.items()]
    if found["alternatives"]:
        lines += _compared([found, *found["alternatives"]])
    assumed = [f"  {name}: {text}" for name, text in found["assumptions"].items()]
    return "\n".join([*lines, "Planned, not run. Assumed are", *assumed])


def _compared(plans):
    """Lines that show plans side by side, the best one marked."""
    lines = ["", "mesh, kept, micro-batches: GiB, s/step, tokens/s/chip"]
    for each in plans:
        names = [field.name for field in dataclasses.fields(Choice)]
        choice = Choice(**{name: each[name] for name in names})
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
