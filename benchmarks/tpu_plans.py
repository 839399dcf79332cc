"""Plans of pretraining for slices of TPU v4: a table and a plot. Nothing was run.

    python benchmarks/tpu_plans.py
        compiles the plans that are missing from docs/tpu_plans.json, a minute each, and
        writes the table and the plot next to it

Mesh, micro-batch and rematerialization are those of the recipe; `keras-openllama
pretrain --plan` compares them with alternatives. Needs the extra `plan`.
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

from matplotlib.figure import Figure

from keras_openllama.planning import plan as planning
from keras_openllama.planning.aot_compile import OutOfDeviceMemoryError
from keras_openllama.runs import recipe
from keras_openllama.utils import plots

# A v4-8 has 8 cores on 4 chips. One preset of each size: v1 and v2 have the same sizes.
SLICES = {
    "v4-8": "v4:2x2x1",
    "v4-16": "v4:2x2x2",
    "v4-32": "v4:2x2x4",
    "v4-64": "v4:2x4x4",
    "v4-128": "v4:4x4x4",
    "v4-256": "v4:4x4x8",
    "v4-512": "v4:4x8x8",
}
NOTE = (
    "Written by `benchmarks/tpu_plans.py`. These are plans: nothing was run on a TPU. "
    "[TPUs](tpu.md) explains the columns and the assumptions."
)
PRESETS = ("3b_v3", "7b_v2", "13b")
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
    options = parser.parse_args()
    path = Path(options.output)
    path.parent.mkdir(exist_ok=True)
    try:
        plans = json.loads(path.read_text()) if path.exists() else {}
        recipes = {preset: recipe.preset_recipe(preset) for preset in options.presets}
    except ValueError as error:
        parser.error(f"{error} (--presets, or the contents of {path})")
    for preset in options.presets:
        for name in options.slices:
            key = f"{preset} {name}"
            # A recipe has no plan for a number of chips that the model does not fit on.
            if key not in plans and chips_of(name) in recipes[preset].planned:
                plans[key] = planned(preset, SLICES[name])
                path.write_text(json.dumps(plans, indent=1) + "\n")
    page = f"# Plans for TPU v4\n\n{NOTE}\n\n{table(plans)}\n"
    path.with_suffix(".md").write_text(page)
    draw(plans, path.with_suffix(".png"))
    print(table(plans))


def chips_of(name):
    """The number of chips of a slice, a string as in recipes."""
    _, _, shape = SLICES[name].partition(":")
    return str(math.prod(map(int, shape.split("x"))))


def planned(preset, topology):
    """The saved figures of a plan, or the reason why it does not fit."""
    try:
        found = planning.plan_pretraining(
            recipe.resolve_recipe(preset), topology, alternatives=False
        )
    except OutOfDeviceMemoryError as error:
        return {"reason": str(error)}
    return {name: found[name] for name in SAVED}


def table(plans):
    """The plans as a table in Markdown."""
    lines = [
        "| plan | chips | data x fsdp | micro-batch per device | peak GiB | s/step | "
        "fusions with matrix products | other computation | attention kernels | "
        "waiting for collectives | tokens/s/chip | MFU | days |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for key, plan in plans.items():
        if "reason" in plan:
            lines.append(f"| {key} | {plan['reason']} |")
            continue
        step, mesh = plan["step_seconds"], plan["mesh"]
        batch = recipe.preset_recipe(plan["preset"]).batch_size
        rows = batch // mesh["data"] // mesh["fsdp"] // plan["micro_batches"]
        other = plan["compute_seconds"] - plan["matmul_seconds"]
        parts = (
            *(plan["matmul_seconds"], other),
            *(plan["kernel_seconds"], plan["exposed_collective_seconds"]),
        )
        cells = (
            *(key, plan["chips"], f"{mesh['data']} x {mesh['fsdp']}", rows),
            *(f"{plan['peak_memory_bytes'] / 2**30:.1f}", f"{step:.2f}"),
            *(f"{part / step:.0%}" for part in parts),
            f"{plan['tokens_per_second_per_chip']:,.0f}",
            *(f"{plan['mfu']:.0%}", f"{plan['days']:,.0f}"),
        )
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def draw(plans, path):
    """Draws MFU and the days of a run against the number of chips."""
    with plots.style():
        figure = Figure(figsize=(9, 4))
        mfu, days = figure.subplots(1, 2)
        for preset in dict.fromkeys(key.split()[0] for key in plans):
            found = [
                plan
                for key, plan in plans.items()
                if key.split()[0] == preset and "reason" not in plan
            ]
            chips = [plan["chips"] for plan in found]
            mfu.plot(chips, [100 * plan["mfu"] for plan in found], "o-", label=preset)
            days.plot(chips, [plan["days"] for plan in found], "o-")
        mfu.set(title="Planned MFU", ylabel="MFU (%)", ylim=(0, 80))
        days.set(
            title="Planned time of the whole run",
            ylabel="days (log scale)",
            yscale="log",
        )
        ticks = [10, 30, 100, 300]
        days.set_yticks(ticks, labels=map(str, ticks))
        for axes in (mfu, days):
            axes.set(xscale="log", xlabel="TPU v4 chips")
            axes.set_xticks([4, 16, 64, 256], labels=["4", "16", "64", "256"])
            axes.minorticks_off()
        figure.legend(loc="outside lower center", ncols=3)
        plots.save(figure, path)


if __name__ == "__main__":
    main()
