"""The calibration of plans as a table, and its points estimated again."""

import collections
import datetime
import importlib.metadata
import json

from keras_openllama.planning import calibration
from keras_openllama.planning.cost_model import CHIPS

NOTE = """\
The cost model's estimate for published runs against their measured speed. Each step was
compiled like a plan, with the same compiler options and assumptions. The expected speed
of a plan is its estimated speed times the geometric mean of the ratios on its type of
chip, or of all ratios if fewer than two runs are on it. Another run is in the range
with a probability of {probability:.0%}, if logarithms of ratios are normally
distributed around the mean of their type of chip. The table has every run that was
compiled.

| | {names} | all |
|---|{lines}---|
| runs | {counts} |
| factor | {factors} |
| range | {ranges} |
"""


def section():
    """The calibration in Markdown."""
    points = calibration.calibration_points()
    found = [calibration.calibration_factor(chip) for chip in (*CHIPS, None)]
    counts = collections.Counter(point.chip for point in points)
    lines = [
        NOTE.format(
            probability=calibration.PROBABILITY,
            names=" | ".join(CHIPS),
            lines="---|" * len(CHIPS),
            counts=" | ".join(str(counts[chip]) for chip in CHIPS)
            + f" | {len(points)}",
            factors=" | ".join(f"{each.expected:.2f}" for each in found),
            ranges=" | ".join(f"{each.low:.2f} to {each.high:.2f}" for each in found),
        ),
        "| run | published | measured tokens/s/chip | estimated | measured / estimated "
        "| matrix products | other computation | attention kernels "
        "| waiting for collectives |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for point in points:
        step = sum(point.seconds.values())
        names = ("matmul", "other", "kernel", "exposed")
        cells = (
            f"[{point.name}]({point.configuration})",
            f"[{point.measured_as}]({point.source})",
            *(
                f"{point.measured:,.0f}",
                f"{point.estimated:,.0f}",
                f"{point.ratio:.2f}",
            ),
            *(f"{point.seconds[f'{name}_seconds'] / step:.0%}" for name in names),
        )
        lines.append(f"| {' | '.join(cells)} |")
    versions = sorted({point.estimated_with for point in points})
    lines += ["", f"Compiled {'; '.join(versions)}. How the compiled steps differ:", ""]
    lines += [f"- {point.name}: {point.differences}" for point in points]
    return "\n".join(lines)


def estimate_again(names):
    """Compiles points again and saves their seconds.

    Args:
        names: parts of the names of the points; all points if empty.
    """
    from calibration.estimate import estimate_seconds  # It imports JAX.

    points = json.loads(calibration.POINTS_FILE.read_text())
    versions = ", ".join(
        f"{package} {importlib.metadata.version(package)}"
        for package in ("jax", "libtpu")
    )
    for saved, point in zip(points, calibration.calibration_points(), strict=True):
        if names and not any(name in point.name for name in names):
            continue
        print(f"Compiling the step of {point.name} …", flush=True)
        saved["seconds"] = estimate_seconds(point)
        saved["estimated_with"] = f"on {datetime.date.today()} with {versions}"
        text = json.dumps(points, indent=1) + "\n"
        calibration.POINTS_FILE.write_text(text)
    calibration.calibration_points.cache_clear()
