"""Loads and evaluates tasks of lm-evaluation-harness."""

import functools
import json
import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval.api.model import LM
from lm_eval.defaults import DEFAULT_OTHER_SEED
from lm_eval.tasks import TaskManager

from keras_openllama.evaluation import squad_metrics
from keras_openllama.evaluation.report import published
from keras_openllama.evaluation.task_names import unknown_task_error
from keras_openllama.utils.types import PathLike

# Loader of the package `datasets` by the suffix of a file.
LOADERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}

logger = logging.getLogger(__name__)


def task_names(
    suite: str | None = None,
    tasks: Sequence[str] = (),
    include_path: PathLike | None = None,
) -> list[str]:
    """Combines a suite and task names.

    Args:
        suite: `"openllama"`, the tasks of the published table, or `None`.
        tasks: names of tasks, groups or tags of the harness.
        include_path: directory with further tasks, in the harness's YAML format.

    Returns:
        The names, each once.

    Raises:
        ValueError: if a suite or task does not exist.

    Example:
        >>> task_names("openllama", ["hellaswag", "lambada_openai"])[-2:]
        ['winogrande', 'lambada_openai']
    """
    if suite not in (None, "openllama"):
        raise ValueError(f'`suite` must be "openllama". Received: suite={suite!r}')
    names = [*(published.load_published_table().tasks if suite else ()), *tasks]
    if not names:
        return []
    known = _manager(include_path).task_index
    for name in names:
        if name not in known:
            raise unknown_task_error(name)
    return list(dict.fromkeys(names))


def load_tasks(
    names: Sequence[str],
    data: PathLike | None = None,
    include_path: PathLike | None = None,
) -> tuple[dict[str, Any], dict[str, str]]:
    """Loads tasks with their data.

    Args:
        names: names of tasks, groups or tags of the harness.
        data: directory of local data. If it has a file `NAME.jsonl`, `NAME.json` or
            `NAME.parquet` for a task (not for a group or tag), its documents, in the
            format of the task's own dataset, replace those of the Hugging Face Hub.
        include_path: see `task_names`.

    Returns:
        A pair: the tasks, for `evaluate_tasks` or `lm_eval.evaluate`; and, by name, the
        reason why a task was skipped because its data is unavailable.

    Raises:
        FileNotFoundError: if `data` is not a directory.

    Example:
        >>> loaded, skipped = load_tasks(["hellaswag"])  # doctest: +SKIP
    """
    if data is not None and not Path(data).is_dir():
        raise FileNotFoundError(f"`data` must be a directory. Received: {data}")
    manager = _manager(include_path)
    loaded, skipped = {"tasks": {}, "groups": {}, "group_map": {}}, {}
    for name in names:
        file = local_task_file(name, data) if name in manager.all_subtasks else None
        try:
            with squad_metrics.provide_squad_metrics():
                found = _load_task(manager, name, file)
        # The package `datasets` passes on any error of its own code, the network or the
        # file system.
        except Exception as error:
            skipped[name] = _reason(name, file, error)
            logger.info("%s is unavailable", name, exc_info=True)
        else:
            for kind, entries in found.items():
                loaded[kind] |= entries
    return loaded, skipped


@functools.cache
def _manager(include_path):
    """The harness's tasks. Reading their configurations takes seconds."""
    return TaskManager(include_path=include_path)


def _load_task(manager, name, file):
    """Loads a task, group or tag, with its data from a file unless that is `None`."""
    if file is None:
        return manager.load([name])
    config = {
        "include": str(manager.task_index[name].yaml_path),
        "task": name,
        "dataset_path": LOADERS[file.suffix],
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {"validation": str(file.resolve())}},
        "training_split": None,
        "validation_split": "validation",
        "test_split": None,
        "fewshot_split": "validation",
    }
    with tempfile.TemporaryDirectory() as directory:
        # JSON is a subset of YAML.
        Path(directory, "task.yaml").write_text(json.dumps(config), "utf-8")
        overrides = TaskManager(include_path=directory, include_defaults=False)
        return overrides.load([name])


def local_task_file(name: str, data: PathLike | None) -> Path | None:
    """Returns the file of a task's documents in a directory, or `None`."""
    if data is None:
        return None
    paths = (Path(data, name + ending) for ending in LOADERS)
    return next((path for path in paths if path.is_file()), None)


def _reason(name, file, error):
    message = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    if file is not None:
        return f"{file} could not be read ({message})"
    if isinstance(error, ImportError):
        return f"it requires a package that is not installed ({message})"
    return (
        f"its data is unavailable ({message}). Connect to a network to download it, or "
        f"put its documents, one JSON object per line, into DIR/{name}.jsonl and add "
        "--data DIR"
    )


def evaluate_tasks(
    model: LM,
    loaded: dict[str, Any],
    num_fewshot: int | None = None,
    limit: float | None = None,
) -> list[dict[str, Any]]:
    """Evaluates a model on tasks.

    Args:
        model: an `lm_eval_model.OpenLlamaLM`, or another model of the harness.
        loaded: the tasks of `load_tasks`.
        num_fewshot: examples in a prompt, for tasks that do not fix the number. `None`
            uses each task's own number.
        limit: the maximum number of documents of a task or, if less than 1, the
            fraction of its documents.

    Returns:
        A row per metric: `"task"`, `"metric"`, `"value"`, `"stderr"` (or `None`),
        `"samples"` (`None` for a group), `"version"`, `"num_fewshot"` and `"limit"`.

    Example:
        >>> loaded, _ = load_tasks(["hellaswag"])  # doctest: +SKIP
        >>> evaluate_tasks(OpenLlamaLM("nano"), loaded, limit=10)  # doctest: +SKIP
    """
    if not loaded["tasks"]:
        return []
    for task in loaded["tasks"].values():
        own = task.get_config("num_fewshot")
        if own != 0 and (num_fewshot is not None or own is None):
            task.set_config(key="num_fewshot", value=num_fewshot or 0)
        task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
    found = lm_eval.evaluate(model, loaded, limit=limit, log_samples=False)
    samples, shots = found["n-samples"], found["n-shot"]
    return [
        {
            "task": task,
            **values,
            "samples": samples.get(task, {}).get("effective"),
            "version": found["versions"].get(task),
            "num_fewshot": shots.get(task, 0),
            "limit": limit,
        }
        for task, results in (found["results"] | found.get("groups", {})).items()
        for values in _metrics(results)
    ]


def _metrics(results):
    """Yields the metrics of a task, whose keys in the harness are `name,filter`."""
    for key, value in results.items():
        metric, _, filtering = key.partition(",")
        if not filtering or metric.endswith("_stderr"):
            continue
        error = results.get(f"{metric}_stderr,{filtering}")
        yield {
            "metric": metric if filtering == "none" else key,
            "value": float(value),
            "stderr": float(error) if isinstance(error, (int, float)) else None,
        }
