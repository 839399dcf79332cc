"""Loss plots of runs, in the style of the figure that OpenLLaMA published."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from keras_openllama.config import LOSS_X_AXES
from keras_openllama.runs import metrics_log
from keras_openllama.utils import plots
from keras_openllama.utils.types import PathLike

# Heuristics: the smoothing window as a share of the longest run; and the share of first
# steps, whose loss is several times the last one, that the y axis need not show.
_SMOOTHED_SHARE = 0.01
_OFF_SCALE_SHARE = 0.02

# Lines with more points than this are rasterized in a vector figure.
_MANY = 10_000


@dataclasses.dataclass(frozen=True)
class PlottedRun:
    """A run to plot.

    Args:
        name: Label in the legend.
        records: Training records, see `metrics_log.read_metrics`.
        validation: Validation records, see `metrics_log.read_validation`.
    """

    name: str
    records: Sequence[dict[str, Any]]
    validation: Sequence[dict[str, Any]] = ()


def read_runs(directories: Iterable[PathLike]) -> list[PlottedRun]:
    """Reads the records of runs.

    Args:
        directories: Directories of the runs.

    Returns:
        The runs, named after their directories, or by the whole path if names collide.

    Raises:
        FileNotFoundError: if a directory has no metrics.
        ValueError: if a run has no step yet, or a line is not a record.
    """
    paths = [os.path.normpath(directory) for directory in directories]
    names = [os.path.basename(os.path.abspath(path)) for path in paths]
    runs = []
    for path, name in zip(paths, names, strict=True):
        records = metrics_log.read_metrics(path)
        if not records:
            raise ValueError(f"{path} has no step yet. Wait for the first one.")
        label = name if names.count(name) == 1 else path
        runs.append(PlottedRun(label, records, metrics_log.read_validation(path)))
    return runs


def loss_figure(
    runs: Sequence[PlottedRun], x: str = "tokens", smooth: int | None = None
) -> Figure:
    """Plots the training loss of runs in one figure, and their validations as points.

    A faint line shows each step, a solid line the exponential average. The first steps
    may be off scale.

    Args:
        runs: The runs, one color each.
        x: `"tokens"`, `"step"` or `"hours"` (of data, compute and checkpoints).
        smooth: Steps of the exponential average; 1 plots the steps as they are. By
            default a hundredth of the longest run.

    Returns:
        The figure.

    Raises:
        ValueError: if there is no run, an argument is invalid, or records lack the
            values that `x` needs.

    Source:
        https://github.com/openlm-research/open_llama, the figure of its README:
        training loss against tokens in billions.

    Example:
        >>> records = [{"step": 1, "tokens": 64, "loss": 9.0}]
        >>> figure = loss_figure([PlottedRun("nano", records)])
        >>> figure.axes[0].get_ylabel()
        'loss (nats per token)'
    """
    if not runs:
        raise ValueError("`runs` must not be empty. Pass at least one run.")
    if smooth is None:
        longest = max(len(run.records) for run in runs)
        smooth = max(1, round(_SMOOTHED_SHARE * longest))
    if smooth < 1:
        raise ValueError(
            f"`smooth` must be a positive number of steps. Received: smooth={smooth}"
        )
    positions = [_x_values(run, x) for run in runs]
    scale, label = _unit(x, max(values[-1] for values in positions))

    with plots.style():
        figure = Figure(figsize=(9, 5.5))
        axes = figure.subplots()
        shown = [
            part
            for number, (run, values) in enumerate(zip(runs, positions, strict=True))
            for part in _draw_run(axes, run, values / scale, smooth, f"C{number}")
        ]
        _set_height(axes, np.concatenate(shown))
        axes.margins(x=0.01)
        axes.set_xlim(left=0)
        has_validation = any(run.validation for run in runs)
        axes.set_title(f"Training {'and validation ' * has_validation}loss")
        axes.set_xlabel(label)
        axes.set_ylabel("loss (nats per token)")
        if smooth > 1:
            note = f"faint: each step; line: exponential average over {smooth:,} steps"
            plots.add_note(axes, note)
        _add_legend(figure, runs)
    return figure


def save_loss_plot(
    runs: Sequence[PlottedRun],
    path: PathLike,
    x: str = "tokens",
    smooth: int | None = None,
) -> None:
    """Saves `loss_figure` to a file, atomically.

    Args:
        runs: See `loss_figure`.
        path: File that ends in .png or .svg.
        x: See `loss_figure`.
        smooth: See `loss_figure`.

    Raises:
        ValueError: for another extension, and as `loss_figure`.
        OSError: if the file cannot be written.
    """
    plots.check_format(path)
    plots.save(loss_figure(runs, x, smooth), path)


def exponential_average(values: Sequence[float], steps: int) -> np.ndarray:
    """Returns the exponential average of a sequence, with bias correction as in Adam.

    Each value has 1 - 1/steps of the weight of the next one. Values that are not finite
    are ignored.

    Args:
        values: Sequence of floats.
        steps: Window of the average, at least 1.

    Returns:
        Array of float64 with the length of `values`; NaN before the first finite value.

    Example:
        >>> exponential_average([4.0, 1.0], 2).tolist()
        [4.0, 2.0]
    """
    decay = 1 - 1 / steps
    average, weight = 0.0, 0.0
    result = np.full(len(values), np.nan)
    for index, value in enumerate(values):
        if math.isfinite(value):
            average = decay * average + (1 - decay) * value
            weight = decay * weight + (1 - decay)
        if weight:
            result[index] = average / weight
    return result


def _column(run, name):
    try:
        return np.array([record[name] for record in run.records], "float64")
    except KeyError:
        raise ValueError(
            f"A record of {run.name} has no {name!r}. Choose another x from "
            f"{', '.join(LOSS_X_AXES)}."
        ) from None


def _x_values(run, x):
    """Positions of the records on the x axis."""
    if x not in LOSS_X_AXES:
        raise ValueError(
            f"`x` must be one of {', '.join(LOSS_X_AXES)}. Received: x={x!r}"
        )
    if x != "hours":
        return _column(run, x)
    parts = ("data_seconds", "compute_seconds", "checkpoint_seconds")
    return np.cumsum(sum(_column(run, part) for part in parts)) / 3600


def _unit(x, largest):
    """Divisor of the x values, and the label of the axis."""
    if x == "hours":
        return 1, "hours of data, compute and checkpoints"
    if x == "step":
        return 1, "step"
    for scale, name in ((1e9, "billions"), (1e6, "millions")):
        if largest >= scale:
            return scale, f"tokens ({name})"
    return 1, "tokens"


def _draw_run(axes, run, positions, smooth, color):
    """Draws a run; returns the arrays of values that must be in the y range."""
    losses = _column(run, "loss")
    line = exponential_average(losses, smooth)
    if smooth > 1:
        axes.plot(
            positions,
            losses,
            color=color,
            alpha=0.25,
            linewidth=0.7,
            zorder=1.5,  # Below the solid lines of other runs.
            rasterized=len(losses) > _MANY,
        )
    axes.plot(positions, line, color=color)
    later = int(_OFF_SCALE_SHARE * len(losses))
    finite = losses[later:][np.isfinite(losses[later:])]
    shown = [line[later:], np.quantile(finite, [0.005])] if finite.size else []
    if run.validation:
        steps = [record["step"] for record in run.validation]
        points = np.array([record["loss"] for record in run.validation], "float64")
        axes.plot(
            np.interp(steps, _column(run, "step"), positions),
            points,
            color=color,
            linestyle="none",
            marker="o",
            markeredgecolor="white",
            zorder=3,
        )
        shown.append(points[np.array(steps) >= run.records[later]["step"]])
    return [np.empty(0), *shown]


def _set_height(axes, values):
    values = values[np.isfinite(values)]
    if values.size:
        room = 0.05 * (values.max() - values.min()) or 0.1
        axes.set_ylim(values.min() - room, values.max() + room)


def _add_legend(figure, runs):
    handles = [Line2D([], [], color=f"C{number}") for number in range(len(runs))]
    labels = [run.name for run in runs]
    if any(run.validation for run in runs):
        dots = dict(color=plots.GRAY, linestyle="none", marker="o")
        handles.append(Line2D([], [], **dots))
        labels.append("validation loss")
    place = dict(loc="outside lower center", ncols=min(4, len(labels)))
    figure.legend(handles, labels, **place)
