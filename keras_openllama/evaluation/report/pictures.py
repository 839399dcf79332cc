"""What runs measured as bars, and what OpenLLaMA published behind them."""

import os
import textwrap

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from keras_openllama.evaluation.report.measurements import (
    check,
    column_of,
    error_of,
    keys_beside,
    limits_of,
    metrics_by_key,
    names_of,
    published_metrics,
)
from keras_openllama.utils import files

_GREY = "#6b7280"


def draw(runs, path):
    """Draws the metrics of runs as bars, what was published as paler ones behind them.

    Args:
        runs: list of dicts, see `measurements.read`, in as many colours.
        path: path that ends in .png or .svg. The file appears whole or not at all.

    Raises:
        ValueError: for another ending, or if there is no run or nothing between 0 and 1
            to draw.
        OSError: if the file cannot be written.
    """
    ending = os.path.splitext(path)[1].lower()
    if ending not in (".png", ".svg"):
        raise ValueError(f"path={str(path)!r}; it must end in .png or .svg")
    figure = figure_of(runs)
    with files.atomic_write(path) as unfinished:
        figure.savefig(unfinished, format=ending[1:], dpi=150)


def drawn_metrics(runs):
    """What has bars: label, key, and the published metric or `None`, from the top."""
    suite = published_metrics(runs)
    drawn = [(metric.name, metric.key, metric) for metric in suite]
    for key in keys_beside(runs):
        found = map(metrics_by_key, runs)
        values = [metrics[key]["value"] for metrics in found if key in metrics]
        if all(0 <= value <= 1 for value in values):
            drawn.append(("/".join(key), key, None))
    return drawn


def figure_of(runs):
    check(runs)
    drawn = drawn_metrics(runs)
    if not drawn:
        raise ValueError("runs hold no metric between 0 and 1; evaluate a task first")
    # Inches: a bar of one run is thicker than one of several.
    thickness = 0.22 if len(runs) == 1 else 0.15
    band = thickness * len(runs) + 0.14
    figure = Figure(figsize=(8, 1.6 + band * len(drawn)), layout="constrained")
    axes = figure.subplots()
    step = thickness / band
    for number, run in enumerate(runs):
        offset = (number - (len(runs) - 1) / 2) * step
        _draw_run(axes, drawn, run, offset, step, f"C{number}")
    axes.set_yticks(range(len(drawn)), [label for label, _, _ in drawn])
    axes.set_ylim(len(drawn) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.set_xlim(0, 1)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(textwrap.fill(", ".join(names_of(runs)), 70), fontweight="bold")
    axes.set_title(limits_of(runs), loc="right", fontsize=8, color=_GREY)
    _add_legend(figure, runs, drawn)
    return figure


def _draw_run(axes, drawn, run, offset, step, colour):
    rows, column = metrics_by_key(run), column_of(run)
    for place, (_, _, metric) in enumerate(drawn):
        if metric and column:
            value = metric.values[column]
            axes.barh(place + offset, value, step, color=colour, alpha=0.3)
    places = [place for place, (_, key, _) in enumerate(drawn) if key in rows]
    found = [rows[drawn[place][1]] for place in places]
    axes.barh(
        np.array(places) + offset,
        [row["value"] for row in found],
        0.55 * step,
        color=colour,
        xerr=[error_of(row) for row in found],
        error_kw=dict(elinewidth=1, capsize=1.5, ecolor="#111827"),
    )


def _add_legend(figure, runs, drawn):
    several = len(runs) > 1
    names = names_of(runs) if several else ["measured"]
    handles = [Patch(color=f"C{number}") for number in range(len(runs))]
    columns = [column_of(run) for run in runs]
    if any(columns) and any(metric for _, _, metric in drawn):
        colour = _GREY if several else "C0"
        handles.append(Patch(color=colour, alpha=0.3, linewidth=0))
        names.append("published" if several else f"published ({columns[0]})")
    handles.append(Line2D([], [], color="#111827", linewidth=1, marker="|"))
    names.append("± one standard error")
    names = [textwrap.fill(name, 70) for name in names]
    columns = max(1, min(3, 90 // max(map(len, names))))
    place = dict(loc="outside lower center", ncols=columns, frameon=False)
    figure.legend(handles, names, **place)
