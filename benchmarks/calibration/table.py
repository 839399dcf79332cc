"""The calibration of plans as a table, and its points priced again."""

import datetime
import importlib.metadata
import json

from keras_openllama.planning import calibration
from keras_openllama.planning.cost_model import CHIPS

NOTE = """\
The cost model's estimate for published runs against their measured speed. Each step was
compiled like a plan, with the same compiler options and assumptions. The expected speed
of a plan is its estimated speed times the geometric mean of the ratios on its type of
chip, or of all ratios if fewer than two runs are on it: {factors}. Its range is that of
the lowest ratio of all, {low:.2f}, and the highest, {high:.2f}. No run that was
compiled is left out. If a new run is as likely to have any rank among these {points},
it is in the range with probability {probability:.0%}.
"""


def section():
    """The calibration in Markdown."""
    points, factor = calibration.calibration_points(), calibration.calibration_factor()
    means = {chip: calibration.calibration_factor(chip).expected for chip in CHIPS}
    lines = [
        NOTE.format(
            factors=", ".join(f"{mean:.2f} on {chip}" for chip, mean in means.items())
            + f", {factor.expected:.2f} over all",
            low=factor.low,
            high=factor.high,
            points=len(points),
            probability=calibration.range_probability(len(points)),
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
            *(f"{point.measured:,.0f}", f"{point.priced:,.0f}", f"{point.ratio:.2f}"),
            *(f"{point.seconds[f'{name}_seconds'] / step:.0%}" for name in names),
        )
        lines.append(f"| {' | '.join(cells)} |")
    versions = sorted({point.priced_with for point in points})
    lines += ["", f"Compiled {'; '.join(versions)}. How the compiled steps differ:", ""]
    lines += [f"- {point.name}: {point.differences}" for point in points]
    return "\n".join(lines)


def price_again(names):
    """Compiles points again and saves their seconds.

    Args:
        names: parts of the names of the points; all points if empty.
    """
    from calibration.price import price  # It imports JAX.

    points = json.loads(calibration.POINTS_FILE.read_text())
    versions = ", ".join(
        f"{package} {importlib.metadata.version(package)}"
        for package in ("jax", "libtpu")
    )
    for saved, point in zip(points, calibration.calibration_points(), strict=True):
        if names and not any(name in point.name for name in names):
            continue
        print(f"Compiling the step of {point.name} …", flush=True)
        saved["seconds"] = price(point)
        saved["priced_with"] = f"on {datetime.date.today()} with {versions}"
        text = json.dumps(points, indent=1) + "\n"
        calibration.POINTS_FILE.write_text(text)
    calibration.calibration_points.cache_clear()
