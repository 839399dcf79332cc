"""What `keras-openllama evaluate` measured, and how."""

import json
import math
import numbers
import os

from keras_openllama.evaluation.report import published

RESULTS = "results.json"


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
        print(tables.table([measurements.read("evaluations/7b_v2")]))
    """
    path = os.path.join(directory, RESULTS)
    try:
        with open(path, encoding="utf-8") as file:
            results = json.load(file)
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(
            f"{directory} has no {RESULTS}; give a directory that `evaluate` wrote"
        ) from None
    except ValueError as error:
        raise ValueError(_malformed(path, f"is no JSON ({error})")) from None
    fault = _fault(results)
    if fault:
        raise ValueError(_malformed(path, fault))
    return results


def _malformed(path, fault):
    return f"{path} {fault}; run `evaluate` again to write it anew"


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


def check(runs, columns=()):
    """Raises a `ValueError` if there is no run, or a column was not published."""
    if not runs:
        raise ValueError("runs is empty; give at least one run")
    known = published.load().columns
    for column in columns:
        if column not in known:
            raise ValueError(f"column {column!r} is not one of {', '.join(known)}")


def names_of(runs):
    """Names of runs, numbered where they would be the same."""
    names = [run["run"]["name"] for run in runs]
    return [
        name if names.count(name) == 1 else f"{name} ({names[:place].count(name) + 1})"
        for place, name in enumerate(names)
    ]


def column_of(run):
    """The published column of a run's preset, or `None`."""
    return published.column_of(run["run"].get("preset"))


def metrics_by_key(run):
    """Dict of a run's metrics by `(task, metric)`."""
    return {(row["task"], row["metric"]): row for row in run["metrics"]}


def published_metrics(runs):
    """List of the published metrics that any of the runs has, in order."""
    keys = {key for run in runs for key in metrics_by_key(run)}
    return [metric for metric in published.load().metrics if metric.key in keys]


def error_of(row):
    """The standard error, or NaN where the harness gives none."""
    value = row.get("stderr")
    return value if _is_number(value) else math.nan


def tasks_by(results, setting):
    """Dict of the tasks by a setting that they were measured with."""
    tasks = {}
    for row in results["metrics"]:
        tasks.setdefault(row.get(setting), {})[row["task"]] = None
    return tasks


def limit_of(results):
    """Says how much of each task was used, if not all of it."""
    limited = tasks_by(results, "limit")
    parts = []
    for limit in sorted(filter(None, limited)):
        tasks = "each task" if len(limited) == 1 else ", ".join(limited[limit])
        share = f"{100 * limit:g} % of the" if limit < 1 else f"the first {limit:g}"
        parts.append(f"Only {share} documents of {tasks}")
    return "; ".join(parts) or None


def limits_of(runs):
    """The limits of runs, a line each, and whose they are unless all have the same."""
    limits = [limit_of(run) for run in runs]
    if len(set(limits)) == 1:
        return limits[0] or ""
    named = zip(names_of(runs), limits, strict=True)
    return "\n".join(f"{name}: {limit}" for name, limit in named if limit)


def versions_of(results):
    """Says which tasks have another version than those compared with 2023."""
    rows, others = metrics_by_key(results), {}
    for metric in published.load().metrics:
        version = rows.get(metric.key, {}).get("version")
        if version not in (None, metric.version):
            others[metric.task] = f"{metric.task} {version} (not {metric.version})"
    told = ", ".join(others.values())
    return [f"Versions not compared with 2023: {told}."] if told else []


def keys_beside(runs):
    """List of what the runs have measured beside the published metrics."""
    suite = {metric.key for metric in published.load().metrics}
    keys = dict.fromkeys(key for run in runs for key in metrics_by_key(run))
    return [key for key in keys if key not in suite]
