"""Training curves of runs, in the manner of OpenLLaMA's published figure."""

import dataclasses
import math
import os

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from keras_openllama.config import LOSS_X_AXES
from keras_openllama.runs import metrics_log
from keras_openllama.utils import files

# Ours: the line is smoothed over this share of the longest run, and the first steps,
# whose loss is several times the last, do not set the height of the picture.
_SMOOTHED_SHARE = 0.01
_LEFT_OUT_SHARE = 0.02

# More points than this are drawn as pixels in a vector picture.
_MANY = 10_000


@dataclasses.dataclass(frozen=True)
class Run:
    """A run to draw.

    Args:
        name: string, in the legend.
        records: list of dicts, see `metrics_log.read`.
        validation: list of dicts, see `metrics_log.read_validation`.
    """

    name: str
    records: list
    validation: list = ()


def read_runs(directories):
    """Reads runs, each named as its directory; by the whole path where names collide.

    Args:
        directories: list of paths.

    Returns:
        List of `Run`.

    Raises:
        FileNotFoundError: if a directory has no metrics.
        ValueError: if it has no step yet, or holds a line that is no record.
    """
    paths = [os.path.normpath(directory) for directory in directories]
    names = [os.path.basename(os.path.abspath(path)) for path in paths]
    runs = []
    for path, name in zip(paths, names, strict=True):
        records = metrics_log.read(path)
        if not records:
            raise ValueError(f"{path} has no step yet; wait for its first")
        label = name if names.count(name) == 1 else path
        runs.append(Run(label, records, metrics_log.read_validation(path)))
    return runs


def loss_figure(runs, x="tokens", smooth=None):
    """Training loss of several runs in one figure, and their validation as points.

    Each step is drawn faint, the exponential average over `smooth` steps on top. The
    first steps may leave the picture at the top.

    Args:
        runs: list of `Run`, drawn in as many colours.
        x: "tokens", "step" or "hours" (of data, compute and checkpoints).
        smooth: int, steps; 1 draws every step as it is. By default a hundredth of the
            longest run.

    Returns:
        `matplotlib.figure.Figure`.

    Raises:
        ValueError: if there is no run, an argument is none of the above, or records
            lack what `x` needs.

    Source:
        https://github.com/openlm-research/open_llama, the figure of its README:
        training loss against tokens in billions.

    Example:
        loss_figure(read_runs(["runs/3b_v2", "runs/7b_v2"])).savefig("loss.png")
    """
    if not runs:
        raise ValueError("runs is empty; give at least one run")
    if smooth is None:
        longest = max(len(run.records) for run in runs)
        smooth = max(1, round(_SMOOTHED_SHARE * longest))
    if smooth < 1:
        raise ValueError(f"smooth={smooth}; it is a number of steps, 1 or more")
    places = [_places(run, x) for run in runs]
    scale, label = _unit(x, max(values[-1] for values in places))

    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.subplots()
    shown = [
        part
        for number, (run, values) in enumerate(zip(runs, places, strict=True))
        for part in _draw_run(axes, run, values / scale, smooth, f"C{number}")
    ]
    _set_height(axes, np.concatenate(shown))
    axes.margins(x=0.01)
    axes.set_xlim(left=0)
    axes.set_xlabel(label)
    axes.set_ylabel("training loss (nats per token)")
    axes.grid(axis="y", alpha=0.3)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    if smooth > 1:
        note = f"faint: each step; line: exponential average over {smooth:,} steps"
        axes.set_title(note, loc="right", fontsize=8, color="#6b7280")
    _add_legend(figure, runs)
    return figure


def draw(runs, path, x="tokens", smooth=None):
    """Draws `loss_figure` into a file, which appears whole or not at all.

    Args:
        runs, x, smooth: see `loss_figure`.
        path: path that ends in .png or .svg.

    Raises:
        ValueError: for another ending, and as `loss_figure`.
        OSError: if the file cannot be written.
    """
    ending = os.path.splitext(path)[1].lower()
    if ending not in (".png", ".svg"):
        raise ValueError(f"path={str(path)!r}; it must end in .png or .svg")
    figure = loss_figure(runs, x, smooth)
    with files.atomic_write(path) as unfinished:
        figure.savefig(unfinished, format=ending[1:], dpi=150)


def smoothed(values, steps):
    """Exponential average, each value weighing 1 - 1/steps of the one after it.

    Begins at the first value (as Adam corrects its bias), and passes over what is not
    finite.

    Args:
        values: sequence of floats.
        steps: int, 1 or more.

    Returns:
        Array of as many float64; NaN before the first finite value.
    """
    decay = 1 - 1 / steps
    average, weight = 0.0, 0.0
    result = np.full(len(values), np.nan)
    for place, value in enumerate(values):
        if math.isfinite(value):
            average = decay * average + (1 - decay) * value
            weight = decay * weight + (1 - decay)
        if weight:
            result[place] = average / weight
    return result


def _column(run, name):
    try:
        return np.array([record[name] for record in run.records], "float64")
    except KeyError:
        raise ValueError(
            f"a record of {run.name} has no {name!r}; choose another x of "
            f"{', '.join(LOSS_X_AXES)}"
        ) from None


def _places(run, x):
    """Where on the x axis each record is."""
    if x not in LOSS_X_AXES:
        raise ValueError(f"x={x!r}; it is one of {', '.join(LOSS_X_AXES)}")
    if x != "hours":
        return _column(run, x)
    parts = ("data_seconds", "compute_seconds", "checkpoint_seconds")
    return np.cumsum(sum(_column(run, part) for part in parts)) / 3600


def _unit(x, largest):
    """What the x axis is divided by, and its label."""
    if x == "hours":
        return 1, "hours of data, compute and checkpoints"
    if x == "step":
        return 1, "step"
    for scale, name in ((1e9, "billions"), (1e6, "millions")):
        if largest >= scale:
            return scale, f"tokens ({name})"
    return 1, "tokens"


def _draw_run(axes, run, places, smooth, colour):
    """Draws a run; returns arrays of what the picture must have room for."""
    losses = _column(run, "loss")
    line = smoothed(losses, smooth)
    if smooth > 1:
        axes.plot(
            *(places, losses),
            color=colour,
            alpha=0.25,
            linewidth=0.7,
            zorder=1.5,  # Below the lines of other runs.
            rasterized=len(losses) > _MANY,
        )
    axes.plot(places, line, color=colour, linewidth=1.5)
    later = int(_LEFT_OUT_SHARE * len(losses))
    finite = losses[later:][np.isfinite(losses[later:])]
    shown = [line[later:], np.quantile(finite, [0.005])] if finite.size else []
    if run.validation:
        steps = [record["step"] for record in run.validation]
        points = np.array([record["loss"] for record in run.validation], "float64")
        axes.plot(
            *(np.interp(steps, _column(run, "step"), places), points),
            color=colour,
            linestyle="none",
            marker="o",
            markersize=5,
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
        grey = dict(color="#6b7280", linestyle="none", marker="o", markersize=5)
        handles.append(Line2D([], [], **grey))
        labels.append("validation")
    columns = min(4, len(labels))
    figure.legend(
        *(handles, labels),
        title="Training loss",
        title_fontproperties={"weight": "bold", "size": "large"},
        loc="outside upper center",
        ncols=columns,
        frameon=False,
    )
