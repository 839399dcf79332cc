"""Bar charts of measured and published metrics."""

import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from keras_openllama.evaluation.report.measurements import (
    check_runs,
    describe_limits,
    metrics_by_key,
    published_column,
    published_metrics,
    run_names,
    standard_error,
    unpublished_keys,
)
from keras_openllama.evaluation.report.published import Metric
from keras_openllama.utils import plots
from keras_openllama.utils.types import PathLike


def draw_chart(runs: Sequence[dict[str, Any]], path: PathLike):
    """Draws the metrics of runs as bars, with published values as paler bars behind.

    Args:
        runs: results of evaluations, see `measurements.read_results`. Each run has its
            own color.
        path: path of a .png or .svg file. The file is written atomically.

    Raises:
        ValueError: if the path has another suffix, if `runs` is empty, or if no metric
            has a value between 0 and 1.
        OSError: if the file cannot be written.
    """
    plots.check_format(path)
    plots.save(make_figure(runs), path)


def metrics_to_draw(
    runs: Sequence[dict[str, Any]],
) -> list[tuple[str, tuple[str, str], Metric | None]]:
    """Selects the metrics that get bars, from top to bottom.

    Args:
        runs: results of evaluations, see `measurements.read_results`.

    Returns:
        Tuples of label, `(task, metric)`, and the published metric or `None`.
    """
    suite = published_metrics(runs)
    drawn = [(metric.name, metric.key, metric) for metric in suite]
    for key in unpublished_keys(runs):
        found = map(metrics_by_key, runs)
        values = [metrics[key]["value"] for metrics in found if key in metrics]
        if all(0 <= value <= 1 for value in values):
            drawn.append(("/".join(key), key, None))
    return drawn


def make_figure(runs: Sequence[dict[str, Any]]) -> Figure:
    """Draws the figure of `draw_chart`."""
    check_runs(runs)
    drawn = metrics_to_draw(runs)
    if not drawn:
        raise ValueError(
            "`runs` must have a metric with values between 0 and 1. Evaluate a task "
            "first."
        )
    # In inches. The bars of a single run are thicker.
    thickness = 0.22 if len(runs) == 1 else 0.15
    band = thickness * len(runs) + 0.14
    step = thickness / band
    with plots.style():
        figure = Figure(figsize=(8, 1.9 + band * len(drawn)))
        axes = figure.subplots()
        for number, run in enumerate(runs):
            offset = (number - (len(runs) - 1) / 2) * step
            _draw_run(axes, drawn, run, offset, step, f"C{number}")
        axes.set_yticks(range(len(drawn)), [label for label, _, _ in drawn])
        axes.set_ylim(len(drawn) - 0.5, -0.5)
        axes.tick_params(axis="y", length=0)
        axes.set_xlim(0, 1)
        axes.set_xlabel("score (0 to 1)")
        axes.grid(visible=False, axis="y")
        title = "Evaluation of " + ", ".join(run_names(runs))
        figure.suptitle(textwrap.fill(title, 70), fontweight="bold", fontsize=12)
        plots.add_note(axes, describe_limits(runs))
        _add_legend(figure, runs, drawn)
    return figure


def _draw_run(axes, drawn, run, offset, step, color):
    rows, column = metrics_by_key(run), published_column(run)
    for place, (_, _, metric) in enumerate(drawn):
        if metric and column:
            value = metric.values[column]
            axes.barh(place + offset, value, step, color=color, alpha=0.3)
    places = [place for place, (_, key, _) in enumerate(drawn) if key in rows]
    found = [rows[drawn[place][1]] for place in places]
    axes.barh(
        np.array(places) + offset,
        [row["value"] for row in found],
        0.55 * step,
        color=color,
        xerr=[standard_error(row) for row in found],
        error_kw=dict(elinewidth=1, capsize=1.5, ecolor="#111827"),
    )


def _add_legend(figure, runs, drawn):
    several = len(runs) > 1
    names = run_names(runs) if several else ["measured"]
    handles = [Patch(color=f"C{number}") for number in range(len(runs))]
    columns = [published_column(run) for run in runs]
    if any(columns) and any(metric for _, _, metric in drawn):
        color = plots.GRAY if several else "C0"
        handles.append(Patch(color=color, alpha=0.3, linewidth=0))
        names.append("published" if several else f"published ({columns[0]})")
    handles.append(Line2D([], [], color="#111827", linewidth=1, marker="|"))
    names.append("± one standard error")
    names = [textwrap.fill(name, 70) for name in names]
    columns = max(1, min(3, 90 // max(map(len, names))))
    place = dict(loc="outside lower center", ncols=columns, frameon=False)
    figure.legend(handles, names, **place)
