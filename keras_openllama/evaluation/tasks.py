"""Tasks of lm-evaluation-harness, run on a model, where their data can be had."""

import functools
import json
import logging
import tempfile
from pathlib import Path

import lm_eval
from lm_eval.defaults import DEFAULT_OTHER_SEED
from lm_eval.tasks import TaskManager

from keras_openllama.evaluation import squad_metrics
from keras_openllama.evaluation.report import published

ENDINGS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}

logger = logging.getLogger(__name__)


def task_names(suite=None, tasks=(), include_path=None):
    """The tasks that a user asks for.

    Args:
        suite: `"openllama"`, the tasks of the published table, or `None`.
        tasks: list of names of the harness's tasks, groups or tags.
        include_path: path of a directory with tasks of one's own, as the harness's
            YAML files.

    Returns:
        List of names, each once.

    Raises:
        ValueError: for a suite or task that there is not.
    """
    if suite not in (None, "openllama"):
        raise ValueError(f"There is one suite, openllama. Received: suite={suite!r}")
    names = [*(published.load_published_table().tasks if suite else ()), *tasks]
    if not names:
        return []
    known = _manager(include_path).task_index
    for name in names:
        if name not in known:
            raise ValueError(
                f"The harness has no task {name!r}. `keras-openllama lm-eval ls tasks` "
                "lists those that it has."
            )
    return list(dict.fromkeys(names))


def load(names, data=None, include_path=None):
    """Loads tasks with their data.

    Args:
        names: list of names of the harness's tasks, groups or tags.
        data: path of a directory: a task, if it is no group or tag, is evaluated on
            `NAME.jsonl`, `.json` or `.parquet` in it, documents in the form of the
            task's own data set, rather than on what the Hugging Face Hub has. `None` is
            the Hub alone.
        include_path: see `task_names`.

    Returns:
        A pair: what `lm_eval.evaluate` takes, and dict of the reasons by name of those
        that cannot be had.

    Raises:
        FileNotFoundError: if `data` is no directory.
    """
    if data is not None and not Path(data).is_dir():
        raise FileNotFoundError(f"`data` is no directory: {data}")
    manager = _manager(include_path)
    loaded, skipped = {"tasks": {}, "groups": {}, "group_map": {}}, {}
    for name in names:
        file = local_file(name, data) if name in manager.all_subtasks else None
        try:
            with squad_metrics.provided():
                found = _load(manager, name, file)
        # The data sets' library raises whatever its own code, the network or the file
        # system raises.
        except Exception as error:
            skipped[name] = _reason(name, file, error)
            logger.info("%s cannot be had", name, exc_info=True)
        else:
            for kind, entries in found.items():
                loaded[kind] |= entries
    return loaded, skipped


@functools.cache
def _manager(include_path):
    """The harness's tasks; it takes seconds to read their configurations."""
    return TaskManager(include_path=include_path)


def _load(manager, name, file):
    """What the harness loads by a name, with its data from a file if there is one."""
    if file is None:
        return manager.load([name])
    config = {
        "include": str(manager.task_index[name].yaml_path),
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
        overrides = TaskManager(include_path=directory, include_defaults=False)
        return overrides.load([name])


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
    if isinstance(error, ImportError):
        return f"it needs a package that is not installed ({said[:300]})"
    return (
        f"its data cannot be had ({said[:300]}). With a network it is downloaded once; "
        f"or put its documents, one JSON object a line, into DIR/{name}.jsonl, and add "
        "--data DIR"
    )


def run(model, loaded, num_fewshot=None, limit=None):
    """Evaluates a model.

    Args:
        model: `lm_eval_model.OpenLlamaLM`, or another `lm_eval.api.model.LM`.
        loaded: what `load` returns.
        num_fewshot: int, examples in a prompt, of tasks that leave it open; `None` is
            each task's own number.
        limit: int, documents of a task at most; or below 1, the share of them.

    Returns:
        List of dicts of `"task"`, `"metric"`, `"value"`, `"stderr"` (or `None`),
        `"samples"` (`None` for a group), `"version"`, `"num_fewshot"` and `"limit"`.
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
    """Metrics of a task, which the harness keys by `name,filter`."""
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
