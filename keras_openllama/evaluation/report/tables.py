"""What runs measured as tables, beside what OpenLLaMA published."""

import math

from keras_openllama.evaluation.report import published
from keras_openllama.evaluation.report.measurements import (
    check,
    column_of,
    error_of,
    keys_beside,
    limit_of,
    metrics_by_key,
    names_of,
    published_metrics,
    tasks_by,
    versions_of,
)

_NONE = "–"
_MADE_WITH = ("preset", "dtype", "backend")


def table(runs, columns=()):
    """Metrics of runs as Markdown, in the rows of the published table.

    One run stands beside its published column and the difference, several stand side
    by side with their published columns after them. What is not in the published table
    has a table of its own, and notes say what was left out and what differs from 2023.

    Args:
        runs: list of dicts, see `measurements.read`.
        columns: list of strings, published columns to add, such as `["LLaMA 7B"]`.

    Returns:
        String.

    Raises:
        ValueError: if there is no run, or a column was not published.
    """
    check(runs, columns)
    suite = published_metrics(runs)
    own = [column_of(run) for run in runs]
    shown = list(dict.fromkeys([*filter(None, own), *columns]))
    heads = ["task/metric"]
    if len(runs) == 1 and own[0]:
        heads += ["measured", f"published, {own[0]}", "difference", *shown[1:]]
    else:
        names = ["measured"] if len(runs) == 1 else names_of(runs)
        heads += [*names, *(f"published, {name}" for name in shown)]
    notes = list(dict.fromkeys(filter(None, (metric.shift for metric in suite))))
    rows = [_row(runs, metric, shown, own, notes) for metric in suite]
    if suite:
        rows += [_average_row(runs, suite, shown, own)]
    parts = [
        f"# Evaluation of {', '.join(names_of(runs))}",
        *([_markdown(heads, rows)] if rows else []),
        *_others(runs),
        *_perplexity(runs),
        *_human_eval(runs),
        _list("Runs", map(_description, runs, names_of(runs))),
        _list("Not measured", _skipped(runs)),
        _list("Since 2023", _since(runs, notes, shown) if shown and suite else ()),
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
    error = error_of(row)
    return f"{row['value']:.3f}" + ("" if math.isnan(error) else f" ± {error:.3f}")


def _row(runs, metric, shown, own, notes):
    """A metric: its name, what runs measured, what was published."""
    measured = [metrics_by_key(run).get(metric.key) for run in runs]
    texts = [f"{metric.values[column]:.2f}" for column in shown]
    if len(runs) == 1 and own[0]:
        texts.insert(1, f"{measured[0]['value'] - metric.values[own[0]]:+.3f}")
    mark = f" [{notes.index(metric.shift) + 1}]" if metric.shift else ""
    return [metric.name + mark, *map(_cell, measured), *texts]


def _average_row(runs, suite, shown, own):
    """The average over what every run has, and of the same metrics as published."""
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
    keys = keys_beside(runs)
    if not keys:
        return []
    heads = [
        "task/metric",
        *(["measured"] if len(runs) == 1 else names_of(runs)),
    ]
    rows = [
        ["/".join(key), *(_cell(metrics_by_key(run).get(key)) for run in runs)]
        for key in keys
    ]
    return ["Beside the published suite:", _markdown(heads, rows)]


def _perplexity(runs):
    """The table of texts; bits per byte compare models with different tokenizers."""
    found = [{row["name"]: row for row in run.get("perplexity") or ()} for run in runs]
    names = dict.fromkeys(name for rows in found for name in rows)
    if not names:
        return []
    suffixes = [""] if len(runs) == 1 else [f", {name}" for name in names_of(runs)]
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
    heads = [
        "HumanEval",
        *(["measured"] if len(runs) == 1 else names_of(runs)),
    ]
    lines = [[rate, *(_rounded(row.get(rate), 3) for row in found)] for rate in rates]
    return [_markdown(heads, lines)]


def _rounded(value, digits):
    return _NONE if value is None else f"{value:.{digits}f}"


def _description(results, name):
    """How a run was made, and what sets it apart from the published ones."""
    run = results["run"]
    parts = [f"{key} {run[key]}" for key in _MADE_WITH if run.get(key)]
    parts += [f"{key} {value}" for key, value in (run.get("versions") or {}).items()]
    sentences = [f"{name}: {', '.join(parts)}." if parts else f"{name}."]
    if limit_of(results):
        sentences.append(f"**{limit_of(results)}**: not comparable.")
    shots = tasks_by(results, "num_fewshot")
    for number in sorted(filter(None, shots)):
        sentences.append(
            f"**{number} examples in each prompt** of {', '.join(shots[number])}; the "
            "published results are without."
        )
    if True in tasks_by(results, "apart"):
        sentences.append("Answers tokenized apart from questions, as in 2023.")
    return " ".join(sentences + versions_of(results))


def _skipped(runs):
    several = len(runs) > 1
    for run, name in zip(runs, names_of(runs), strict=True):
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
