"""Small training runs, and functions that read and compare their results."""

import contextlib
import dataclasses
import hashlib
import json
import shutil
from pathlib import Path
from pydoc_data.topics import topics
from unittest import mock

import jax
import numpy as np
import orbax.checkpoint as ocp
from checkout import ROOT
from jax.experimental.compilation_cache import compilation_cache

from keras_openllama import presets

TOKENIZER = ROOT / "presets" / "open_llama_nano" / "tokenizer.model"

# The numerical results in a record; the other values are times.
_COMPUTED = (
    *("step", "loss", "accuracy", "targets", "grad_norm", "param_norm"),
    *("learning_rate", "tokens", "skipped", "batch"),
)


def smaller_nano():
    """Nano with two narrow layers, by name; it compiles and saves quickly."""
    nano = presets.find("open_llama_nano")
    sizes = {"num_layers": 2, "hidden_dim": 64, "intermediate_dim": 96, "head_dim": 16}
    return {nano.name: dataclasses.replace(nano, config={**nano.config, **sizes})}


def small_model():
    """Context manager that replaces nano in the registry by the smaller one."""
    return mock.patch.dict(presets.registry(), smaller_nano())


def small_data(tmp_path_factory):
    """Prepared data of two sources, made once per session."""
    from keras_openllama.data.preparation import prepare_dataset
    from keras_openllama.data.prepared_data import PreparedData

    directory = tmp_path_factory.getbasetemp() / "pretraining_data"
    if directory.exists():
        return PreparedData.open(str(directory / "data"))
    directory.mkdir()
    names = sorted(topics)
    specs = {}
    for source, part in (("prose", names[::2]), ("manual", names[1::2])):
        path = directory / f"{source}.jsonl"
        path.write_text("\n".join(json.dumps({"text": topics[n]}) for n in part))
        specs[source] = [str(path)]
    return prepare_dataset(
        *(specs, str(TOKENIZER), str(directory / "data")),
        workers=1,
        validation_fraction=0.1,
        report=lambda line: None,
    )


def cache_directory(tmp_path_factory):
    """Directory of this session's persistent compilation cache."""
    directory = tmp_path_factory.getbasetemp() / "pretraining_cache"
    directory.mkdir(exist_ok=True)
    return directory


@contextlib.contextmanager
def compilation_cached(directory):
    """Context manager that enables JAX's persistent compilation cache."""
    names = (
        *("jax_enable_compilation_cache", "jax_compilation_cache_dir"),
        "jax_persistent_cache_min_compile_time_secs",
    )
    before = {name: getattr(jax.config, name) for name in names}
    for name, value in zip(names, (True, str(directory), 0.1), strict=True):
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    try:
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()


# ----- Results of a run


def records(output):
    """Records of `metrics.jsonl`; non-finite numbers remain strings."""
    lines = (Path(output) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def steps_logged(output):
    """Number of steps in `metrics.jsonl` so far."""
    try:
        return (Path(output) / "metrics.jsonl").read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0


def checkpoints(output):
    """Steps of all checkpoint directories, and of the complete ones."""
    directory = Path(output) / "checkpoints"
    found = sorted(int(p.name) for p in directory.glob("*") if p.name.isdecimal())
    complete = [s for s in found if (directory / str(s) / "checkpoint.json").exists()]
    return found, complete


def arrays(output, step):
    """Arrays of a checkpoint by path, read by Orbax alone."""
    path = Path(output).absolute() / "checkpoints" / str(step) / "arrays"
    with contextlib.closing(ocp.Checkpointer(ocp.PyTreeCheckpointHandler())) as orbax:
        known = orbax.metadata(path).item_metadata.tree
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(np.ndarray), known)
        tree = orbax.restore(path, ocp.args.PyTreeRestore(restore_args=as_numpy))
    leaves, _ = jax.tree.flatten_with_path(tree)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def digests(output, step):
    """SHA-256 of each array of a checkpoint."""
    return {
        path: hashlib.sha256(f"{a.dtype}{a.shape}".encode() + a.tobytes()).hexdigest()
        for path, a in arrays(output, step).items()
    }


def results_of(output):
    """All numerical results of a run, for bit-exact comparison."""
    output = Path(output)
    _, complete = checkpoints(output)
    return {
        "metrics": [[r.get(name) for name in _COMPUTED] for r in records(output)],
        "validation": (output / "validation.jsonl").read_text(),
        "skipped": (output / "skipped.jsonl").read_text(),
        "samples": (output / "samples.txt").read_text(),
        "last checkpoint": complete[-1],
        "arrays": digests(output, complete[-1]),
    }


def copy_without_last_checkpoint(output, copy):
    """Copies a run without its last checkpoint, as if killed while writing it."""
    shutil.copytree(output, copy)
    _, complete = checkpoints(copy)
    shutil.rmtree(Path(copy) / "checkpoints" / str(complete[-1]))
    return copy
