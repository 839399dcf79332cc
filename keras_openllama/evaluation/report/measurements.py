"""Results of `keras-openllama evaluate`: reading and describing them."""

import json
import math
import numbers
import os
from collections.abc import Sequence
from typing import Any

from keras_openllama.evaluation.report import published
from keras_openllama.evaluation.report.published import Metric, load_published_table
from keras_openllama.utils.types import PathLike

RESULTS_FILE = "results.json"


def read_results(directory: PathLike) -> dict[str, Any]:
    """Reads the results of an evaluation.

    Args:
        directory: the output directory of `keras-openllama evaluate`.

    Returns:
        A dict with `run`, `metrics`, `skipped`, `perplexity` and `human_eval`.

    Raises:
        FileNotFoundError: if the directory has no results.
        ValueError: if the file does not hold results.

    Example:
        >>> results = read_results("evaluations/7b_v2")  # doctest: +SKIP
        >>> print(tables.results_table([results]))  # doctest: +SKIP
    """
    path = os.path.join(directory, RESULTS_FILE)
    try:
        with open(path, encoding="utf-8") as file:
            results = json.load(file)
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(
            f"{directory} has no {RESULTS_FILE}. Pass an output directory of "
            "`evaluate`."
        ) from None
    except ValueError as error:
        raise ValueError(_malformed(path, f"is not valid JSON ({error})")) from None
    problem = _find_problem(results)
    if problem:
        raise ValueError(_malformed(path, problem))
    return results


def _malformed(path, problem):
    return f"{path} {problem}. Run `evaluate` again to replace it."


def _find_problem(results):
    """Describes what is wrong with the contents of a results file, or `None`."""
    if not isinstance(results, dict):
        return "must hold a JSON object"
    if not isinstance(results.get("run"), dict) or "name" not in results["run"]:
        return "has no 'run' with a 'name'"
    if not isinstance(results.get("metrics"), list):
        return "has no list 'metrics'"
    for row in results["metrics"]:
        if not isinstance(row, dict) or not {"task", "metric", "value"} <= set(row):
            return f"has a metric without task, metric and value: {row}"
        if not _is_number(row["value"]):
            return f"has a metric whose value is not a number: {row}"
    return None


def _is_number(value):
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def check_runs(runs: Sequence[dict[str, Any]], columns: Sequence[str] = ()):
    """Checks that there is a run, and that the columns were published.

    Args:
        runs: results of evaluations, see `read_results`.
        columns: published columns.

    Raises:
        ValueError: if `runs` is empty or a column was not published.
    """
    if not runs:
        raise ValueError("`runs` must not be empty. Received: []")
    known = load_published_table().columns
    for column in columns:
        if column not in known:
            raise ValueError(
                f"`columns` must be among {', '.join(known)}. Received: {column!r}"
            )


def run_names(runs: Sequence[dict[str, Any]]) -> list[str]:
    """Returns the names of runs, numbered where they are equal.

    Example:
        >>> run_names([{"run": {"name": "7b"}}] * 2)
        ['7b (1)', '7b (2)']
    """
    names = [run["run"]["name"] for run in runs]
    return [
        name if names.count(name) == 1 else f"{name} ({names[:i].count(name) + 1})"
        for i, name in enumerate(names)
    ]


def published_column(run: dict[str, Any]) -> str | None:
    """Returns the published column of the run's preset, or `None`."""
    return published.column_of_preset(run["run"].get("preset"))


def metrics_by_key(run: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    """Returns the metrics of a run by `(task, metric)`."""
    return {(row["task"], row["metric"]): row for row in run["metrics"]}


def published_metrics(runs: Sequence[dict[str, Any]]) -> list[Metric]:
    """Returns the published metrics that at least one run measured, in order."""
    keys = {key for run in runs for key in metrics_by_key(run)}
    return [metric for metric in load_published_table().metrics if metric.key in keys]


def unpublished_keys(runs: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """Returns `(task, metric)` of the measured metrics that were not published."""
    suite = {metric.key for metric in load_published_table().metrics}
    keys = dict.fromkeys(key for run in runs for key in metrics_by_key(run))
    return [key for key in keys if key not in suite]


def standard_error(row: dict[str, Any]) -> float:
    """Returns the standard error of a metric, or NaN if the harness gives none."""
    value = row.get("stderr")
    return value if _is_number(value) else math.nan


def tasks_by_setting(
    results: dict[str, Any], setting: str
) -> dict[Any, dict[str, None]]:
    """Groups tasks by the value of a setting that they were measured with.

    Args:
        results: see `read_results`.
        setting: a key of the metrics, such as `"limit"` or `"num_fewshot"`.

    Returns:
        Names of tasks, as the keys of a dict, by value of the setting.
    """
    tasks = {}
    for row in results["metrics"]:
        tasks.setdefault(row.get(setting), {})[row["task"]] = None
    return tasks


def describe_limit(results: dict[str, Any]) -> str | None:
    """Describes how many documents of each task were used; `None` if all were.

    Example:
        >>> metric = {"task": "piqa", "metric": "acc", "value": 0.8, "limit": 100}
        >>> describe_limit({"metrics": [metric]})
        'Only the first 100 documents of each task'
    """
    limited = tasks_by_setting(results, "limit")
    parts = []
    for limit in sorted(filter(None, limited)):
        tasks = "each task" if len(limited) == 1 else ", ".join(limited[limit])
        share = f"{100 * limit:g} % of the" if limit < 1 else f"the first {limit:g}"
        parts.append(f"Only {share} documents of {tasks}")
    return "; ".join(parts) or None


def describe_limits(runs: Sequence[dict[str, Any]]) -> str:
    """Describes the limits of runs, one line for each unless all have the same."""
    limits = [describe_limit(run) for run in runs]
    if len(set(limits)) == 1:
        return limits[0] or ""
    named = zip(run_names(runs), limits, strict=True)
    return "\n".join(f"{name}: {limit}" for name, limit in named if limit)


def describe_versions(results: dict[str, Any]) -> list[str]:
    """Describes which tasks have another version than the one compared with 2023."""
    rows, others = metrics_by_key(results), {}
    for metric in load_published_table().metrics:
        version = rows.get(metric.key, {}).get("version")
        if version not in (None, metric.version):
            others[metric.task] = f"{metric.task} {version} (not {metric.version})"
    if not others:
        return []
    return [f"Versions not compared with 2023: {', '.join(others.values())}."]
