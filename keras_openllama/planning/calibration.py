"""Compares plans with measured runs, and derives what to expect of a plan.

`calibration_points.json` lists published runs with their measured speed, and the time
that the cost model estimates for the same step, from which the estimated speed follows.
The ratio of the two says how far a plan is from a run: it includes what the cost model
does not count, such as the host, the input pipeline and contention for memory. No point
is dropped.

The expected speed of a plan is its estimated speed times the geometric mean of the
ratios of runs on the same type of chip, for which the compiler's estimates have their
own error; of all runs if fewer than two are on it. The range is the prediction interval
of Student's t distribution for the logarithm of another ratio, with the standard
deviation of the runs around the mean of their chip type (around the mean of all).

`benchmarks/tpu_plans.py --calibration` estimates the points again.
"""

import collections
import dataclasses
import functools
import json
import math
from collections.abc import Mapping
from pathlib import Path
from statistics import mean
from typing import Any

import scipy.special

PROBABILITY = 0.8  # That another run is in its range.
POINTS_FILE = Path(__file__).with_name("calibration_points.json")


@dataclasses.dataclass(frozen=True)
class CalibrationPoint:
    """A published run, and the cost model's estimate for its step.

    Attributes:
        name: model and slice.
        source: URL of the measured speed.
        configuration: URL of the settings.
        measured_as: the speed as it was published.
        step: which step was compiled: one of `benchmarks/calibration/estimate.py`, or
            `"keras_openllama"`, this package's own.
        sizes: sizes of the network.
        topology: see `aot_compile.topology_devices`.
        mesh: sizes of the mesh axes.
        sequences_per_chip: sequences that a chip processes in a step.
        sequence_length: tokens of a sequence.
        rematerialize: rematerialization policy.
        attention_block: block size of the attention kernel.
        kernel_work: work of the published attention kernels over that of the compiled
            ones.
        differences: how the compiled step differs from the published one.
        measured: measured tokens/s/chip.
        seconds: estimated seconds of a step, by part.
        estimated_with: date of the estimate, and versions of the compiler.
    """

    name: str
    source: str
    configuration: str
    measured_as: str
    step: str
    sizes: dict[str, int]
    topology: str
    mesh: dict[str, int]
    sequences_per_chip: int
    sequence_length: int
    rematerialize: str
    attention_block: int
    kernel_work: float
    differences: str
    measured: float
    seconds: dict[str, float]
    estimated_with: str

    @property
    def chip(self) -> str:
        """Name of the chip type."""
        return self.topology.partition(":")[0]

    @property
    def estimated(self) -> float:
        """Estimated tokens/s/chip."""
        tokens = self.sequences_per_chip * self.sequence_length
        return tokens / sum(self.seconds.values())

    @property
    def ratio(self) -> float:
        """Measured speed over estimated speed."""
        return self.measured / self.estimated


@dataclasses.dataclass(frozen=True)
class ExpectedRange:
    """An expected value with a range.

    Attributes:
        low: lower end of the range.
        expected: the expected value.
        high: upper end of the range.
    """

    low: float
    expected: float
    high: float


@functools.cache
def calibration_points() -> tuple[CalibrationPoint, ...]:
    """Returns the published runs, in the order of the file.

    Example:
        >>> calibration_points()[0].name
        'EasyLM 7B, v4-512'
    """
    points = json.loads(POINTS_FILE.read_text(encoding="utf-8"))
    return tuple(CalibrationPoint(**point) for point in points)


def points_for_chip(
    chip: str | None = None, points: tuple[CalibrationPoint, ...] | None = None
) -> tuple[CalibrationPoint, ...]:
    """Returns the published runs whose mean ratio is that of a chip type.

    Args:
        chip: name of the chip type.
        points: published runs. Defaults to `calibration_points()`.

    Returns:
        The runs on the chip type; all of them if fewer than two are on it.

    Example:
        >>> {point.chip for point in points_for_chip("v4")}
        {'v4'}
        >>> points_for_chip("v3") == calibration_points()
        True
    """
    points = points or calibration_points()
    on_chip = tuple(point for point in points if point.chip == chip)
    return on_chip if len(on_chip) > 1 else points  # One run is no evidence.


def calibration_factor(
    chip: str | None = None, points: tuple[CalibrationPoint, ...] | None = None
) -> ExpectedRange:
    """Returns measured speed over estimated speed.

    Args:
        chip: name of the chip type. Defaults to the mean over all of them.
        points: published runs. Defaults to `calibration_points()`.

    Returns:
        The geometric mean of the ratios, and the range of another one, see the module.

    Example:
        >>> factor = calibration_factor("v4")
        >>> factor.low < factor.expected < factor.high
        True
    """
    points = points or calibration_points()
    evidence = points_for_chip(chip, points)
    logs = [math.log(point.ratio) for point in evidence]
    if len(evidence) == len(points):
        groups = [logs]
    else:
        by_chip = collections.defaultdict(list)
        for point in points:
            by_chip[point.chip].append(math.log(point.ratio))
        groups = list(by_chip.values())
    degrees = sum(len(group) - 1 for group in groups)
    squares = sum((log - mean(group)) ** 2 for group in groups for log in group)
    quantile = scipy.special.stdtrit(degrees, (1 + PROBABILITY) / 2)
    deviation = math.sqrt(squares / degrees * (1 + 1 / len(logs)))
    center, width = mean(logs), float(quantile) * deviation
    return ExpectedRange(*map(math.exp, (center - width, center, center + width)))


def expected_figures(plan: Mapping[str, Any]) -> dict[str, float]:
    """Returns the expected speed and time of a plan, each with a range.

    Args:
        plan: `topology`, and figures that the cost model estimates. Used are
            `tokens_per_second_per_chip`, `mfu`, `days` and `chip_hours`; those that are
            missing are skipped.

    Returns:
        `expected_` and the name of each figure; the same with `_low` and `_high` for
        the ends of the range.

    Example:
        >>> figures = expected_figures({"topology": "v4:2x2x1", "mfu": 0.6, "days": 10})
        >>> list(figures)[:3]
        ['expected_mfu', 'expected_mfu_low', 'expected_mfu_high']
        >>> figures["expected_days_low"] < figures["expected_days_high"]
        True
    """
    factor = calibration_factor(plan["topology"].partition(":")[0])
    # A higher speed means less time.
    inverse = ExpectedRange(1 / factor.high, 1 / factor.expected, 1 / factor.low)
    scales = {
        "tokens_per_second_per_chip": factor,
        "mfu": factor,
        "days": inverse,
        "chip_hours": inverse,
    }
    figures = {}
    for name, scale in scales.items():
        if name in plan:
            figures[f"expected_{name}"] = plan[name] * scale.expected
            figures[f"expected_{name}_low"] = plan[name] * scale.low
            figures[f"expected_{name}_high"] = plan[name] * scale.high
    return figures


def with_range(
    figures: Mapping[str, float], name: str, form: str, scale: float = 1
) -> str:
    """Formats an expected figure with its range.

    Args:
        figures: see `expected_figures`.
        name: name of the figure, without `expected_`.
        form: format of a number.
        scale: factor of all three numbers, such as the price of a chip-hour.

    Example:
        >>> figures = {"expected_mfu": 0.6, "expected_mfu_low": 0.5}
        >>> with_range({**figures, "expected_mfu_high": 0.7}, "mfu", ".0%")
        '60% (50% to 70%)'
    """
    value, low, high = (
        f"{scale * figures[f'expected_{name}{end}']:{form}}"
        for end in ("", "_low", "_high")
    )
    return f"{value} ({low} to {high})"
