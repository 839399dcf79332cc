"""Markdown tables of measured and published metrics."""

import math
from collections.abc import Sequence
from typing import Any

from keras_openllama.evaluation.report import published
from keras_openllama.evaluation.report.measurements import (
    check_runs,
    describe_limit,
    describe_versions,
    metrics_by_key,
    published_column,
    published_metrics,
    run_names,
    standard_error,
    tasks_by_setting,
    unpublished_keys,
)

_NONE = "–"
_SETTINGS = ("preset", "dtype", "backend")


def results_table(runs: Sequence[dict[str, Any]], columns: Sequence[str] = ()) -> str:
    """Formats the metrics of runs as Markdown, with the rows of the published table.

    For one run, the table has the measured values, the published column of the preset
    and the difference. For several runs, it has a column for each, followed by their
    published columns. Metrics that were not published have a table of their own. Notes
    name the tasks that were skipped and what differs from 2023.

    Args:
        runs: results of evaluations, see `measurements.read_results`.
        columns: published columns to add, such as `["LLaMA 7B"]`.

    Returns:
        The tables and notes.

    Raises:
        ValueError: if `runs` is empty or a column was not published.

    Example:
        >>> metric = {"task": "piqa", "metric": "acc", "value": 0.8, "stderr": 0.01}
        >>> run = {"run": {"name": "7b", "preset": "7b"}, "metrics": [metric]}
        >>> results_table([run]).splitlines()[4]
        '| piqa/acc | 0.800 ± 0.010 | 0.76 | +0.040 |'
    """
    check_runs(runs, columns)
    suite = published_metrics(runs)
    own = [published_column(run) for run in runs]
    shown = list(dict.fromkeys([*filter(None, own), *columns]))
    heads = ["task/metric"]
    if len(runs) == 1 and own[0]:
        heads += ["measured", f"published, {own[0]}", "difference", *shown[1:]]
    else:
        names = ["measured"] if len(runs) == 1 else run_names(runs)
        heads += [*names, *(f"published, {name}" for name in shown)]
    notes = list(dict.fromkeys(filter(None, (metric.difference for metric in suite))))
    rows = [_row(runs, metric, shown, own, notes) for metric in suite]
    if suite:
        rows += [_average_row(runs, suite, shown, own)]
    parts = [
        f"# Evaluation of {', '.join(run_names(runs))}",
        *([_markdown(heads, rows)] if rows else []),
        *_unpublished(runs),
        *_perplexity(runs),
        *_human_eval(runs),
        _list("Runs", map(_describe_run, runs, run_names(runs))),
        _list("Not measured", _skipped(runs)),
        _list(
            "Differences from 2023",
            _differences(runs, notes, shown) if shown and suite else (),
        ),
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def _markdown(heads, rows):
    lines = [heads, ["---"] + ["---:"] * (len(heads) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _list(title, items):
    items = [f"- {item}" for item in items]
    return "\n".join([f"{title}:", "", *items]) if items else ""


def _cell(row):
    if row is None:
        return _NONE
    error = standard_error(row)
    return f"{row['value']:.3f}" + ("" if math.isnan(error) else f" ± {error:.3f}")


def _row(runs, metric, shown, own, notes):
    """The cells of a metric: its name, the measured and the published values."""
    measured = [metrics_by_key(run).get(metric.key) for run in runs]
    texts = [f"{metric.values[column]:.2f}" for column in shown]
    if len(runs) == 1 and own[0]:
        texts.insert(1, f"{measured[0]['value'] - metric.values[own[0]]:+.3f}")
    mark = f" [{notes.index(metric.difference) + 1}]" if metric.difference else ""
    return [metric.name + mark, *map(_cell, measured), *texts]


def _average_row(runs, suite, shown, own):
    """The average over the metrics that all runs have, measured and published."""
    keys = set.intersection(*(set(metrics_by_key(run)) for run in runs))
    common = [metric for metric in suite if metric.key in keys]
    if not common:
        return ["average"] + [_NONE] * (len(runs) + len(shown))
    found = [
        [metrics_by_key(run)[metric.key]["value"] for metric in common] for run in runs
    ]
    averages = list(map(published.average, found))
    name, values, digits = _published_average(common, shown)
    texts = [f"{value:.{digits}f}" for value in values]
    if len(runs) == 1 and own[0]:
        texts.insert(1, f"{averages[0] - values[0]:+.3f}")
    if len(common) < len(suite):
        name += " by all runs"
    cells = [name, *(f"{value:.3f}" for value in averages), *texts]
    return [f"**{cell}**" for cell in cells]


def _published_average(metrics, columns):
    """Label, values by column, and digits; the published average if complete."""
    table = published.load_published_table()
    if len(metrics) == len(table.metrics):
        return "average", [table.average[column] for column in columns], 2
    values = [
        published.average(metric.values[column] for metric in metrics)
        for column in columns
    ]
    return f"average of the {len(metrics)} measured", values, 3


def _unpublished(runs):
    """The table of metrics that are not in the published suite."""
    keys = unpublished_keys(runs)
    if not keys:
        return []
    heads = [
        "task/metric",
        *(["measured"] if len(runs) == 1 else run_names(runs)),
    ]
    rows = [
        ["/".join(key), *(_cell(metrics_by_key(run).get(key)) for run in runs)]
        for key in keys
    ]
    return ["Not in the published suite:", _markdown(heads, rows)]


def _perplexity(runs):
    """The table of perplexity, and of bits per byte, which any models can compare."""
    found = [{row["name"]: row for row in run.get("perplexity") or ()} for run in runs]
    names = dict.fromkeys(name for rows in found for name in rows)
    if not names:
        return []
    suffixes = [""] if len(runs) == 1 else [f", {name}" for name in run_names(runs)]
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
    """The table of pass rates of the runs whose samples were executed."""
    found = [run.get("human_eval") or {} for run in runs]
    rates = dict.fromkeys(
        key for row in found for key in row if key.startswith("pass@")
    )
    if not rates:
        return []
    heads = [
        "HumanEval",
        *(["measured"] if len(runs) == 1 else run_names(runs)),
    ]
    lines = [[rate, *(_rounded(row.get(rate), 3) for row in found)] for rate in rates]
    return [_markdown(heads, lines)]


def _rounded(value, digits):
    return _NONE if value is None else f"{value:.{digits}f}"


def _describe_run(results, name):
    """The settings of a run, and how it differs from the published results."""
    run = results["run"]
    parts = [f"{key} {run[key]}" for key in _SETTINGS if run.get(key)]
    parts += [f"{key} {value}" for key, value in (run.get("versions") or {}).items()]
    sentences = [f"{name}: {', '.join(parts)}." if parts else f"{name}."]
    if describe_limit(results):
        sentences.append(f"**{describe_limit(results)}**: not comparable.")
    shots = tasks_by_setting(results, "num_fewshot")
    for number in sorted(filter(None, shots)):
        sentences.append(
            f"**{number} examples in each prompt** of {', '.join(shots[number])}; the "
            "published results are zero-shot."
        )
    if True in tasks_by_setting(results, "apart"):  # See `separate_tokenization`.
        sentences.append(
            "Contexts and continuations were tokenized separately, as in 2023."
        )
    return " ".join(sentences + describe_versions(results))


def _skipped(runs):
    several = len(runs) > 1
    for run, name in zip(runs, run_names(runs), strict=True):
        for task, reason in (run.get("skipped") or {}).items():
            yield f"{name}, {task}: {reason}" if several else f"{task}: {reason}"


def _differences(runs, notes, shown):
    yield from (f"[{number}] {text}" for number, text in enumerate(notes, 1))
    joint = any(not row.get("apart") for run in runs for row in run["metrics"])
    for difference in published.load_published_table().differences:
        if difference.joint_tokenization_only and not joint:
            continue
        columns = [column for column in shown if column in difference.columns]
        if columns:
            yield f"{', '.join(columns)}: {difference.text}"
