"""Tasks of lm-evaluation-harness, run on a model, where their data can be had."""

import functools
import json
import logging
import tempfile
from pathlib import Path

import lm_eval
from lm_eval.tasks import TaskManager

from keras_openllama.evaluation import published, squad_metrics

ENDINGS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}

logger = logging.getLogger(__name__)


def task_names(suite=None, tasks=()):
    """The tasks that a user asks for.

    Args:
        suite: `"openllama"`, the tasks of the published table, or `None`.
        tasks: list of names of the harness's tasks, groups or tags.

    Returns:
        List of names, each once.

    Raises:
        ValueError: for a suite or task that there is not.
    """
    if suite not in (None, "openllama"):
        raise ValueError(f"There is one suite, openllama. Received: suite={suite!r}")
    names = [*(published.load().tasks if suite else ()), *tasks]
    known = _manager().task_index
    for name in names:
        if name not in known:
            raise ValueError(
                f"The harness has no task {name!r}. `keras-openllama lm-eval ls tasks` "
                "lists those that it has."
            )
    return list(dict.fromkeys(names))


def load(names, data=None):
    """Loads tasks with their data.

    Args:
        names: list of names of the harness's tasks, groups or tags.
        data: path of a directory: a task is evaluated on `NAME.jsonl`, `.json` or
            `.parquet` in it, documents in the form of the task's own data set, rather
            than on what the Hugging Face Hub has. `None` is the Hub alone.

    Returns:
        A pair: dict of `lm_eval.api.task.Task` by name, and dict of the reasons by name
        of those whose data cannot be had.

    Raises:
        FileNotFoundError: if `data` is no directory.
    """
    if data is not None and not Path(data).is_dir():
        raise FileNotFoundError(f"`data` is no directory: {data}")
    tasks, skipped = {}, {}
    for name in names:
        file = local_file(name, data)
        try:
            with squad_metrics.provided():
                tasks |= _load(name, file)
        # The data sets' library raises whatever its own code, the network or the file
        # system raises.
        except Exception as error:
            skipped[name] = _reason(name, file, error)
            logger.debug("%s cannot be had", name, exc_info=True)
    return tasks, skipped


@functools.cache
def _manager():
    """The harness's tasks; it takes seconds to read their configurations."""
    return TaskManager()


def _load(name, file):
    """The tasks of a name, with their data from a file if there is one."""
    if file is None:
        return _manager().load([name])["tasks"]
    config = {
        "include": str(_manager().task_index[name].yaml_path),
        "task": name,
        "dataset_path": ENDINGS[file.suffix],
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {"validation": str(file.resolve())}},
        "training_split": None,
        "validation_split": "validation",
        "test_split": None,
        "fewshot_split": "validation",
    }
    with tempfile.TemporaryDirectory() as directory:
        # JSON is YAML, too.
        Path(directory, "task.yaml").write_text(json.dumps(config), "utf-8")
        manager = TaskManager(include_path=directory, include_defaults=False)
        return manager.load([name])["tasks"]


def local_file(name, data):
    """Path of a task's documents in a directory, or `None`."""
    if data is None:
        return None
    paths = (Path(data, name + ending) for ending in ENDINGS)
    return next((path for path in paths if path.is_file()), None)


def _reason(name, file, error):
    said = " ".join(f"{type(error).__name__}: {error}".split())
    if file is not None:
        return f"{file} cannot be used ({said[:300]})"
    return (
        f"its data cannot be had ({said[:300]}). With a network it is downloaded once; "
        f"or put its documents, one JSON object a line, into DIR/{name}.jsonl, and add "
        "--data DIR"
    )


def run(model, tasks, num_fewshot=None, limit=None):
    """Evaluates a model.

    Args:
        model: `harness.OpenLlamaLM`, or another `lm_eval.api.model.LM`.
        tasks: dict of `lm_eval.api.task.Task`, see `load`.
        num_fewshot: int, examples in a prompt; `None` is each task's own number.
        limit: int, documents of a task at most; or below 1, the share of them.

    Returns:
        List of dicts of `"task"`, `"metric"`, `"value"`, `"stderr"` (or `None`),
        `"samples"` and `"version"`.
    """
    if not tasks:
        return []
    found = lm_eval.simple_evaluate(
        model,
        tasks=list(tasks.values()),
        num_fewshot=num_fewshot,
        limit=limit,
        log_samples=False,
    )
    rows = []
    for task, values in found["results"].items():
        for key, value in values.items():
            metric, _, filtering = key.partition(",")
            if not filtering or metric.endswith("_stderr"):
                continue
            error = values.get(f"{metric}_stderr,{filtering}")
            rows.append(
                {
                    "task": task,
                    "metric": metric if filtering == "none" else key,
                    "value": float(value),
                    "stderr": float(error) if isinstance(error, (int, float)) else None,
                    "samples": found["n-samples"][task]["effective"],
                    "version": found["versions"].get(task),
                }
            )
    return rows
