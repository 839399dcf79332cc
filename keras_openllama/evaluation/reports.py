"""What runs of train/evaluate.py measured, beside what OpenLLaMA published."""

import json
import math
import numbers
import os
import textwrap

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from keras_openllama.evaluation import published
from keras_openllama.training.data import files

RESULTS = "results.json"

_NONE = "–"
_MADE_WITH = ("preset", "dtype", "backend")
_GREY = "#6b7280"


def read(directory):
    """Reads what an evaluation wrote.

    Args:
        directory: path of an evaluation's output.

    Returns:
        Dict with `run`, `metrics`, `skipped`, `perplexity` and `human_eval`.

    Raises:
        FileNotFoundError: if there are no results in it.
        ValueError: if the file holds something else.

    Example:
        print(reports.table([reports.read("evaluations/7b_v2")]))
    """
    path = os.path.join(directory, RESULTS)
    try:
        with open(path, encoding="utf-8") as file:
            results = json.load(file)
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(
            f"{directory} has no {RESULTS}; give a directory that train/evaluate.py "
            "wrote"
        ) from None
    except ValueError as error:
        raise ValueError(_malformed(path, f"is no JSON ({error})")) from None
    fault = _fault(results)
    if fault:
        raise ValueError(_malformed(path, fault))
    return results


def table(runs, columns=()):
    """Metrics of runs as Markdown, in the rows of the published table.

    One run stands beside its published column and the difference, several stand side
    by side with their published columns after them. What is not in the published table
    has a table of its own, and notes say what was left out and what differs from 2023.

    Args:
        runs: list of dicts, see `read`.
        columns: list of strings, published columns to add, such as `["LLaMA 7B"]`.

    Returns:
        String.

    Raises:
        ValueError: if there is no run, or a column was not published.
    """
    _check(runs, columns)
    suite = [metric for metric in published.load().metrics if _measured(runs, metric)]
    own = [_column(run) for run in runs]
    shown = list(dict.fromkeys([*filter(None, own), *columns]))
    heads = ["task/metric"]
    if len(runs) == 1 and own[0]:
        heads += ["measured", f"published, {own[0]}", "difference", *shown[1:]]
    else:
        names = ["measured"] if len(runs) == 1 else _names(runs)
        heads += [*names, *(f"published, {name}" for name in shown)]
    notes = list(dict.fromkeys(filter(None, (metric.shift for metric in suite))))
    rows = [_row(runs, metric, shown, own, notes) for metric in suite]
    if suite:
        rows += [_average_row(runs, suite, shown, own)]
    parts = [
        f"# Evaluation of {', '.join(_names(runs))}",
        *([_markdown(heads, rows)] if rows else []),
        *_others(runs),
        *_perplexity(runs),
        *_human_eval(runs),
        _list("Runs", map(_description, runs, _names(runs))),
        _list("Not measured", _skipped(runs)),
        _list("Since 2023", _since(runs, notes, shown) if shown and suite else ()),
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def draw(runs, path):
    """Draws the metrics of runs as bars, what was published as paler ones behind them.

    Args:
        runs: list of dicts, see `read`, in as many colours.
        path: path that ends in .png or .svg. The file appears whole or not at all.

    Raises:
        ValueError: for another ending, or if there is no run or nothing between 0 and 1
            to draw.
        OSError: if the file cannot be written.
    """
    ending = os.path.splitext(path)[1].lower()
    if ending not in (".png", ".svg"):
        raise ValueError(f"path={str(path)!r}; it must end in .png or .svg")
    figure = _figure(runs)
    with files.appearing(path) as unfinished:
        figure.savefig(unfinished, format=ending[1:], dpi=150)


def write(runs, directory, columns=()):
    """Writes `table.md`, and `table.png` and `table.svg` if there is a bar to draw.

    Args:
        runs, columns: see `table`.
        directory: path; made if it is not there.

    Returns:
        List of the paths written.

    Raises:
        ValueError, OSError: as `table` and `draw`.
    """
    text = table(runs, columns)
    os.makedirs(directory, exist_ok=True)
    paths = [os.path.join(directory, "table.md")]
    with files.appearing(paths[0]) as unfinished:
        with open(unfinished, "w", encoding="utf-8") as file:
            file.write(text)
    if _drawn(runs):
        for ending in ("png", "svg"):
            paths.append(os.path.join(directory, f"table.{ending}"))
            draw(runs, paths[-1])
    return paths


# Runs


def _malformed(path, fault):
    return f"{path} {fault}; run train/evaluate.py again to write it anew"


def _fault(results):
    """What is wrong with the contents of a file of results; `None` if nothing."""
    if not isinstance(results, dict):
        return "holds no object"
    if not isinstance(results.get("run"), dict) or "name" not in results["run"]:
        return "has no 'run' with a 'name'"
    if not isinstance(results.get("metrics"), list):
        return "has no list 'metrics'"
    for row in results["metrics"]:
        if not isinstance(row, dict) or not {"task", "metric", "value"} <= set(row):
            return f"has a metric without task, metric and value: {row}"
        if not _is_number(row["value"]):
            return f"has a metric whose value is no number: {row}"
    return None


def _is_number(value):
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _check(runs, columns=()):
    if not runs:
        raise ValueError("runs is empty; give at least one run")
    known = published.load().columns
    for column in columns:
        if column not in known:
            raise ValueError(f"column {column!r} is not one of {', '.join(known)}")


def _names(runs):
    """Names of runs, numbered where they would be the same."""
    names = [run["run"]["name"] for run in runs]
    return [
        name if names.count(name) == 1 else f"{name} ({names[:place].count(name) + 1})"
        for place, name in enumerate(names)
    ]


def _column(run):
    return published.column_of(run["run"].get("preset"))


def _rows(run):
    return {(row["task"], row["metric"]): row for row in run["metrics"]}


def _measured(runs, metric):
    return any(metric.key in _rows(run) for run in runs)


def _error(row):
    """The standard error, or NaN where the harness gives none."""
    value = row.get("stderr")
    return value if _is_number(value) else math.nan


# The table


def _markdown(heads, rows):
    lines = [heads, ["---"] + ["---:"] * (len(heads) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _list(title, items):
    items = [f"- {item}" for item in items]
    return "\n".join([f"{title}:", "", *items]) if items else ""


def _cell(row):
    if row is None:
        return _NONE
    error = _error(row)
    return f"{row['value']:.3f}" + ("" if math.isnan(error) else f" ± {error:.3f}")


def _row(runs, metric, shown, own, notes):
    """A metric: its name, what runs measured, what was published."""
    measured = [_rows(run).get(metric.key) for run in runs]
    texts = [f"{metric.values[column]:.2f}" for column in shown]
    if len(runs) == 1 and own[0]:
        texts.insert(1, f"{measured[0]['value'] - metric.values[own[0]]:+.3f}")
    mark = f" [{notes.index(metric.shift) + 1}]" if metric.shift else ""
    return [metric.name + mark, *map(_cell, measured), *texts]


def _average_row(runs, suite, shown, own):
    """The average over what every run has, and of the same metrics as published."""
    keys = set.intersection(*(set(_rows(run)) for run in runs))
    common = [metric for metric in suite if metric.key in keys]
    if not common:
        return ["average"] + [_NONE] * (len(runs) + len(shown))
    found = [[_rows(run)[metric.key]["value"] for metric in common] for run in runs]
    averages = list(map(published.average, found))
    name, values, digits = _published_average(common, shown)
    texts = [f"{value:.{digits}f}" for value in values]
    if len(runs) == 1 and own[0]:
        texts.insert(1, f"{averages[0] - values[0]:+.3f}")
    if len(common) < len(suite):
        name += " by all"
    cells = [name, *(f"{value:.3f}" for value in averages), *texts]
    return [f"**{cell}**" for cell in cells]


def _published_average(metrics, columns):
    """Its name, its value in each column, its digits: those published, if whole."""
    table = published.load()
    if len(metrics) == len(table.metrics):
        return "average", [table.average[column] for column in columns], 2
    values = [
        published.average(metric.values[column] for metric in metrics)
        for column in columns
    ]
    return f"average of the {len(metrics)} measured", values, 3


def _others(runs):
    """The table of what was measured beside the published suite."""
    keys = _keys_beside(runs)
    if not keys:
        return []
    heads = ["task/metric", *(["measured"] if len(runs) == 1 else _names(runs))]
    rows = [
        ["/".join(key), *(_cell(_rows(run).get(key)) for run in runs)] for key in keys
    ]
    return ["Beside the published suite:", _markdown(heads, rows)]


def _perplexity(runs):
    """The table of texts; bits per byte compare models with different tokenizers."""
    found = [{row["name"]: row for row in run.get("perplexity") or ()} for run in runs]
    names = dict.fromkeys(name for rows in found for name in rows)
    if not names:
        return []
    suffixes = [""] if len(runs) == 1 else [f", {name}" for name in _names(runs)]
    columns = [("perplexity", "perplexity", 2), ("bits_per_byte", "bits/byte", 3)]
    heads = [title + suffix for suffix in suffixes for _, title, _ in columns]
    lines = [
        [name]
        + [
            _rounded(rows.get(name, {}).get(key), digits)
            for rows in found
            for key, _, digits in columns
        ]
        for name in names
    ]
    return ["Perplexity:", _markdown(["source", *heads], lines)]


def _human_eval(runs):
    """The table of pass rates, of runs whose code was executed."""
    found = [run.get("human_eval") or {} for run in runs]
    rates = dict.fromkeys(
        key for row in found for key in row if key.startswith("pass@")
    )
    if not rates:
        return []
    heads = ["HumanEval", *(["measured"] if len(runs) == 1 else _names(runs))]
    lines = [[rate, *(_rounded(row.get(rate), 3) for row in found)] for rate in rates]
    return [_markdown(heads, lines)]


def _rounded(value, digits):
    return _NONE if value is None else f"{value:.{digits}f}"


def _keys_beside(runs):
    suite = {metric.key for metric in published.load().metrics}
    keys = dict.fromkeys(key for run in runs for key in _rows(run))
    return [key for key in keys if key not in suite]


def _description(results, name):
    """How a run was made, and what sets it apart from the published ones."""
    run = results["run"]
    parts = [f"{key} {run[key]}" for key in _MADE_WITH if run.get(key)]
    parts += [f"{key} {value}" for key, value in (run.get("versions") or {}).items()]
    sentences = [f"{name}: {', '.join(parts)}." if parts else f"{name}."]
    if _limit(results):
        sentences.append(f"**{_limit(results)}**: not comparable.")
    shots = _tasks_by(results, "num_fewshot")
    for number in sorted(filter(None, shots)):
        sentences.append(
            f"**{number} examples in each prompt** of {', '.join(shots[number])}; the "
            "published results are without."
        )
    if True in _tasks_by(results, "apart"):
        sentences.append("Answers tokenized apart from questions, as in 2023.")
    return " ".join(sentences + _versions(results))


def _tasks_by(results, setting):
    """Dict of the tasks by a setting that they were measured with."""
    tasks = {}
    for row in results["metrics"]:
        tasks.setdefault(row.get(setting), {})[row["task"]] = None
    return tasks


def _limit(results):
    """Says how much of each task was used, if not all of it."""
    limited = _tasks_by(results, "limit")
    parts = []
    for limit in sorted(filter(None, limited)):
        tasks = "each task" if len(limited) == 1 else ", ".join(limited[limit])
        share = f"{100 * limit:g} % of the" if limit < 1 else f"the first {limit:g}"
        parts.append(f"Only {share} documents of {tasks}")
    return "; ".join(parts) or None


def _limits(runs):
    """The limits of runs, a line each, and whose they are unless all have the same."""
    limits = [_limit(run) for run in runs]
    if len(set(limits)) == 1:
        return limits[0] or ""
    named = zip(_names(runs), limits, strict=True)
    return "\n".join(f"{name}: {limit}" for name, limit in named if limit)


def _versions(results):
    """Says which tasks have another version than those compared with 2023."""
    rows, others = _rows(results), {}
    for metric in published.load().metrics:
        version = rows.get(metric.key, {}).get("version")
        if version not in (None, metric.version):
            others[metric.task] = f"{metric.task} {version} (not {metric.version})"
    told = ", ".join(others.values())
    return [f"Versions not compared with 2023: {told}."] if told else []


def _skipped(runs):
    several = len(runs) > 1
    for run, name in zip(runs, _names(runs), strict=True):
        for task, reason in (run.get("skipped") or {}).items():
            yield f"{name}, {task}: {reason}" if several else f"{task}: {reason}"


def _since(runs, notes, shown):
    yield from (f"[{number}] {text}" for number, text in enumerate(notes, 1))
    together = any(not row.get("apart") for run in runs for row in run["metrics"])
    for shift in published.load().shifts:
        if shift.together and not together:
            continue
        columns = [column for column in shown if column in shift.columns]
        if columns:
            yield f"{', '.join(columns)}: {shift.text}"


# The picture


def _drawn(runs):
    """What has bars: label, key, and the published metric or `None`, from the top."""
    suite = [metric for metric in published.load().metrics if _measured(runs, metric)]
    drawn = [(metric.name, metric.key, metric) for metric in suite]
    for key in _keys_beside(runs):
        values = [_rows(run)[key]["value"] for run in runs if key in _rows(run)]
        if all(0 <= value <= 1 for value in values):
            drawn.append(("/".join(key), key, None))
    return drawn


def _figure(runs):
    _check(runs)
    drawn = _drawn(runs)
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
    figure.suptitle(textwrap.fill(", ".join(_names(runs)), 70), fontweight="bold")
    axes.set_title(_limits(runs), loc="right", fontsize=8, color=_GREY)
    _add_legend(figure, runs, drawn)
    return figure


def _draw_run(axes, drawn, run, offset, step, colour):
    rows, column = _rows(run), _column(run)
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
        xerr=[_error(row) for row in found],
        error_kw=dict(elinewidth=1, capsize=1.5, ecolor="#111827"),
    )


def _add_legend(figure, runs, drawn):
    several = len(runs) > 1
    names = _names(runs) if several else ["measured"]
    handles = [Patch(color=f"C{number}") for number in range(len(runs))]
    columns = [_column(run) for run in runs]
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
