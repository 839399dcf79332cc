"""Plans of pretraining for slices of TPUs: tables and plots. Nothing was run.

    python benchmarks/tpu_plans.py
        compiles the plans that are missing from docs/tpu_plans.json, a minute each, and
        writes the tables and the plots next to it
    python benchmarks/tpu_plans.py --price v4=3.22 v5e=1.20
        adds the price of each run, at these dollars per chip-hour, to what it prints
    python benchmarks/tpu_plans.py --calibration [NAME …]
        first compiles the steps of the published runs again, some minutes each, and
        saves their estimates in keras_openllama/planning/calibration_points.json

On v4, mesh, micro-batch and rematerialization are those of the recipe, and the step is
compiled at full depth. For other chips, `choice_search` ranks the choices, and the
first that fits is compiled with three layers. If half as many chips are faster, each,
the same choice for twice as many is compiled, too: the ranking ignores that products of
very many tokens are slower. `keras-openllama pretrain --plan` compares a choice with
alternatives. Needs the extra `plan`.
"""

import argparse
import json
import math
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ["KERAS_BACKEND"] = "jax"
os.environ["JAX_PLATFORMS"] = "cpu"

from calibration.table import estimate_again, section
from matplotlib.figure import Figure

from keras_openllama import presets
from keras_openllama.planning import calibration
from keras_openllama.planning import plan as planning
from keras_openllama.planning.aot_compile import (
    OutOfDeviceMemoryError,
    topology_devices,
)
from keras_openllama.planning.choice_search import on_twice_the_chips, ranked_choices
from keras_openllama.planning.compilation_cache import CompilationCache
from keras_openllama.planning.execution_choice import ExecutionChoice
from keras_openllama.planning.step_estimate import StepEstimator
from keras_openllama.runs import recipe
from keras_openllama.utils import plots

# Names count cores on v4 and v5p (a v4-8 has 4 chips), and chips on v5e and v6e.
_SHAPES_2D = {16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
_SHAPES_3D = {16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8"}
SLICES = {
    **{"v4-8": "v4:2x2x1", "v4-16": "v4:2x2x2"},
    **{f"v4-{2 * n}": f"v4:{shape}" for n, shape in _SHAPES_3D.items()},
    **{f"v5e-{n}": f"v5e:{shape}" for n, shape in _SHAPES_2D.items()},
    **{f"v5p-{2 * n}": f"v5p:{shape}" for n, shape in _SHAPES_3D.items()},
    **{f"v6e-{n}": f"v6e:{shape}" for n, shape in _SHAPES_2D.items()},
}
CHIP_TYPES = ("v4", "v5e", "v5p", "v6e")
NOTE = (
    "Written by `benchmarks/tpu_plans.py`. These are plans: nothing was run on a TPU. "
    "[TPUs](tpu.md) explains the columns and the assumptions. Plans for v4 are "
    "compiled at full depth. Those for other chips are extrapolated from a compilation "
    "with three layers; of the plans for v4, this estimates the time within 2 %. "
    "Chip-hours are those of the whole recipe."
)
# One preset of each size: v1 and v2 have the same sizes.
PRESETS = ("3b_v3", "7b_v2", "13b")
ATTEMPTS = 2  # Heuristic: choices to compile for a plan, if the first does not fit.
SAVED = (
    *("preset", "topology", "chips", "mesh", "rematerialize", "micro_batches"),
    *("peak_memory_bytes", "step_seconds", "matmul_seconds", "compute_seconds"),
    *("kernel_seconds", "collective_seconds", "exposed_collective_seconds"),
    *("tokens_per_second_per_chip", "mfu", "days", "compile_seconds"),
)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--presets", nargs="+", default=PRESETS)
    parser.add_argument("--slices", nargs="+", default=SLICES, choices=SLICES)
    parser.add_argument("--output", default="docs/tpu_plans.json", metavar="FILE")
    parser.add_argument(
        "--price",
        nargs="+",
        default=[],
        type=chip_price,
        metavar="CHIP=DOLLARS",
        help="dollars per chip-hour, such as v4=3.22; no price is built in",
    )
    parser.add_argument(
        "--no-compile", action="store_true", help="write only what was planned before"
    )
    parser.add_argument(
        "--calibration",
        nargs="*",
        metavar="NAME",
        help="estimate published runs again, those whose names contain NAME",
    )
    options = parser.parse_args()
    if options.calibration is not None:
        estimate_again(options.calibration)
    path = Path(options.output)
    path.parent.mkdir(exist_ok=True)
    try:
        plans = json.loads(path.read_text()) if path.exists() else {}
        recipes = {preset: recipe.preset_recipe(preset) for preset in options.presets}
    except ValueError as error:
        parser.error(f"{error} (--presets, or the contents of {path})")
    for name in [] if options.no_compile else options.slices:
        for preset in options.presets:
            key = f"{preset} {name}"
            # A recipe has no plan for a number of chips that the model does not fit on.
            v4 = name.startswith("v4")
            if key in plans or (v4 and chips_of(name) not in recipes[preset].planned):
                continue
            if v4:
                plans[key] = planned(preset, SLICES[name])
            else:
                half = plans.get(f"{preset} {half_of(name)}")
                plans[key] = searched(preset, SLICES[name], half)
            path.write_text(json.dumps(plans, indent=1) + "\n")
    path.with_suffix(".md").write_text(page(plans))
    draw(plans, path.with_suffix(".png"))
    print(page(plans, dict(options.price)))


def chip_price(text):
    """Parses `CHIP=DOLLARS`."""
    chip, _, dollars = text.partition("=")
    if chip not in CHIP_TYPES:
        raise argparse.ArgumentTypeError(
            f"must name one of {', '.join(CHIP_TYPES)}, such as v4=3.22. "
            f"Received: {text!r}"
        )
    try:
        price = float(dollars)
    except ValueError:
        price = math.nan
    if not 0 < price < math.inf:
        raise argparse.ArgumentTypeError(
            f"must be a positive number of dollars, such as v4=3.22. Received: {text!r}"
        )
    return chip, price


def chips_of(name):
    """The number of chips of a slice, a string as in recipes."""
    _, _, shape = SLICES[name].partition(":")
    return str(math.prod(map(int, shape.split("x"))))


def half_of(name):
    """The name of the slice of the same chips with half as many."""
    chip, _, size = name.partition("-")
    return f"{chip}-{int(size) // 2}"


def planned(preset, topology):
    """The saved figures of the recipe's plan, or the reason why it does not fit."""
    try:
        found = planning.plan_pretraining(
            recipe.resolve_recipe(preset),
            topology,
            alternatives=False,
            cache=CompilationCache(),
        )
    except OutOfDeviceMemoryError as error:
        return {"reason": str(error)}
    return {name: found[name] for name in SAVED}


def searched(name, topology, half=None):
    """The saved figures of the best choice, or why there is none.

    Args:
        name: the preset.
        topology: chip type and shape of the slice.
        half: the plan for half as many chips, if there is one.
    """
    preset, settings = presets.find(name), recipe.preset_recipe(name)
    chip, devices = topology_devices(topology)
    estimator = StepEstimator(
        preset.config, settings, chip, devices, cache=CompilationCache()
    )

    def figures(choice):
        print(f"{name} on {topology}: {choice} …", file=sys.stderr, flush=True)
        try:
            estimate = estimator.from_one_depth(choice)
        except OutOfDeviceMemoryError as error:
            print(f"  {error}", file=sys.stderr, flush=True)
            return None
        found = planning.plan_figures(preset.config, settings, choice, chip, estimate)
        found |= {"preset": preset.name, "topology": topology}
        return {key: found[key] for key in (*SAVED, "extrapolated_from")}

    choices = ranked_choices(preset, settings, chip, len(devices))
    best = next(filter(None, map(figures, choices[:ATTEMPTS])), None)
    if half and "reason" not in half and (best is None or slower(best, half)):
        twice = on_twice_the_chips(ExecutionChoice.of_plan(half))
        if twice not in (None, best and ExecutionChoice.of_plan(best)):
            other = figures(twice)
            if other and (best is None or slower(best, other)):
                best = other
    return best or {"topology": topology, "reason": "does not fit"}


def slower(plan, other):
    """Whether a plan is slower than another one, per chip, by more than 0.5 %."""
    rate = "tokens_per_second_per_chip"
    return plan[rate] < 0.995 * other[rate]


def page(plans, prices=None):
    """The plans as a page in Markdown, with a table for each type of chip."""
    parts = ["# Plans for TPUs", NOTE]
    for chip in CHIP_TYPES:
        found = {key: plans[key] for key in plan_order(plans, chip)}
        if found:
            parts += [f"## TPU {chip}", table(found, (prices or {}).get(chip))]
    parts += ["## Calibration", section()]
    return "\n\n".join(parts) + "\n"


def plan_order(plans, chip):
    """The keys of a chip type's plans, by preset and number of chips."""
    slices, sizes = list(SLICES), list(PRESETS)
    keys = [key for key in plans if key.split()[1].startswith(f"{chip}-")]

    def position(key):
        preset, name = key.split()
        return sizes.index(preset) if preset in sizes else -1, slices.index(name)

    return sorted(keys, key=position)


def chip_hours(plan):
    """Chip-hours of the whole run."""
    return plan["days"] * 24 * plan["chips"]


def table(plans, price=None):
    """Plans as a table in Markdown, with the price of a run if a chip-hour has one."""
    names = [
        *("plan", "chips", "data x fsdp", "micro-batch per device", "rematerialize"),
        *("peak GiB", "expected tokens/s/chip", "expected MFU", "expected days"),
        *("expected chip-hours", "estimated s/step", "fusions with matrix products"),
        *("other computation", "attention kernels", "waiting for collectives"),
        *("estimated tokens/s/chip", "estimated MFU"),
    ]
    if price:
        names.append(f"dollars at {price:g} per chip-hour")
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for key, plan in plans.items():
        if "reason" in plan:
            reason = f"| {key} | {chips_of(key.split()[1])} | {plan['reason']} "
            lines.append(reason + "| " * (len(names) - 3) + "|")
            continue
        step, mesh = plan["step_seconds"], plan["mesh"]
        batch = recipe.preset_recipe(plan["preset"]).batch_size
        rows = batch // mesh["data"] // mesh["fsdp"] // plan["micro_batches"]
        other = plan["compute_seconds"] - plan["matmul_seconds"]
        parts = (
            *(plan["matmul_seconds"], other),
            *(plan["kernel_seconds"], plan["exposed_collective_seconds"]),
        )
        cells = [
            *(key, plan["chips"], f"{mesh['data']} x {mesh['fsdp']}", rows),
            plan["rematerialize"],
            f"{plan['peak_memory_bytes'] / 2**30:.1f}",
            *expected_cells(plan),
            f"{step:.2f}",
            *(f"{part / step:.0%}" for part in parts),
            *(f"{plan['tokens_per_second_per_chip']:,.0f}", f"{plan['mfu']:.0%}"),
        ]
        if price:
            cells.append(
                calibration.with_range(expected(plan), "chip_hours", ",.0f", price)
            )
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def expected(plan):
    """The expected figures of a plan."""
    return calibration.expected_figures({**plan, "chip_hours": chip_hours(plan)})


def expected_cells(plan):
    """The expected figures of a plan with their ranges."""
    forms = {
        "tokens_per_second_per_chip": ",.0f",
        "mfu": ".0%",
        "days": ",.1f",
        "chip_hours": ",.0f",
    }
    figures = expected(plan)
    return [calibration.with_range(figures, *item) for item in forms.items()]


def draw(plans, path):
    """Draws MFU and chip-hours against the number of chips, a column for each size."""
    sizes = {preset: preset.partition("_")[0].upper() for preset in PRESETS}
    with plots.style():
        figure = Figure(figsize=(10, 6.2))
        grid = figure.subplots(2, 3, sharex=True, sharey="row")
        for column, (preset, size) in enumerate(sizes.items()):
            mfu, hours = grid[:, column]
            for chip in CHIP_TYPES:
                found = [
                    plans[key]
                    for key in plan_order(plans, chip)
                    if key.split()[0] == preset and "reason" not in plans[key]
                ]
                chips = [plan["chips"] for plan in found]
                label = f"TPU {chip}" if column == 0 else None
                figures = [expected(plan) for plan in found]
                for axes, name, scale in (
                    (mfu, "mfu", 100),
                    (hours, "chip_hours", 1 / 1000),
                ):
                    low, middle, high = (
                        [scale * each[f"expected_{name}{end}"] for each in figures]
                        for end in ("_low", "", "_high")
                    )
                    (line,) = axes.plot(chips, middle, "o-", label=label)
                    axes.fill_between(
                        chips, low, high, color=line.get_color(), alpha=0.15
                    )
            mfu.set(title=size, ylim=(0, 90))
            hours.set(yscale="log", xscale="log", xlabel="chips")
            hours.set_xticks([4, 16, 64, 256], labels=["4", "16", "64", "256"])
            ticks = [5, 10, 20, 50, 100, 200]
            hours.set_yticks(ticks, labels=map(str, ticks))
            for axes in (mfu, hours):
                axes.minorticks_off()
        grid[0, 0].set_ylabel("expected MFU (%)")
        grid[1, 0].set_ylabel("thousand chip-hours of the run")
        lines, labels = grid[0, 0].get_legend_handles_labels()
        figure.legend(lines, labels, loc="outside lower center", ncols=len(CHIP_TYPES))
        plots.save(figure, path)


if __name__ == "__main__":
    main()
