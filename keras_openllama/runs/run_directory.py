"""The directory of a run: what the run is, and that one process at a time trains."""

import contextlib
import importlib.metadata
import json
import math
import platform

import jax
from jax.experimental import multihost_utils

import keras_openllama
from keras_openllama.checkpoints.training_run import RUN, RUN_FORMAT, TOKENIZER
from keras_openllama.data import mixture as mixtures
from keras_openllama.utils import files, locks

PRETRAINING, FINETUNING = "pretraining", "finetuning"

_LOCK = ".lock"
# What decides which tokens a step sees: another value would repeat or leave out data.
# And the optimizer, since another one has other moments.
_FIXED = (
    *("batch_size", "sequence_length", "seed", "packing", "mask_documents"),
    "optimizer",
    # Of fine-tuning: its sequences, and the kinds and shapes of what is trained.
    *("pack", "chat_template", "lora_rank", "lora_targets", "int8"),
)
# What does not change the course of a run.
_FREE = (
    *("meshes", "planned", "micro_batches", "rematerialize"),
    *("milestone_every", "save_every", "keep_last"),
    *("validate_every", "validation_batches", "sample_every"),
    "max_skipped_steps",
    "mixture",  # Whose weights are compared, see `mixture_from`.
)


def versions():
    """Versions of what a run depends on, as far as it is installed: dict of strings.

    Fine-tuning has no use for Grain.
    """
    found = {
        "keras_openllama": keras_openllama.__version__,
        "python": platform.python_version(),
    }
    for name in ("jax", "jaxlib", "keras", "keras-hub", "orbax-checkpoint", "grain"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def read(directory):
    """What a run is: the dict that `write` wrote, or `None` where there is no run.

    Raises:
        ValueError: if the file is damaged, or of another format.
    """
    path = files.join(directory, RUN)
    if not files.exists(path):
        return None
    try:
        run = json.loads(files.read_bytes(path))
        if "format" not in run and "lora_rank" in run:
            raise _OldRun
        if run["format"] != RUN_FORMAT:
            raise ValueError(f"its format is {run['format']}, not {RUN_FORMAT}")
    except _OldRun:
        raise ValueError(
            f"{directory} holds a fine-tuning run of keras_openllama 0.1, which this "
            "version cannot resume. If that run was complete, load its results: "
            f"{directory}/adapters (`lm.load_adapters`) or {directory}/model "
            "(`from_preset`). Else start again in another output directory, or finish "
            "it with keras_openllama 0.1."
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged: {error!r}.") from error
    return run


class _OldRun(Exception):
    """A fine-tuning run whose checkpoint is `state.npz`."""


def write(directory, run, tokenizer):
    """Writes what a run is, and its tokenizer.

    Args:
        directory: string.
        run: dict, as JSON: `preset`, `recipe`, `architecture`, `data`.
        tokenizer: bytes of the SentencePiece model.
    """
    files.write_bytes(files.join(directory, TOKENIZER), tokenizer)
    run = {"format": RUN_FORMAT, **run, "versions": versions()}
    data = json.dumps(run, indent=1).encode()
    files.write_bytes(files.join(directory, RUN), data)


def write_once(directory, run, tokenizer, changed):
    """`write` on the first process if the run is new or changed; all wait for that.

    Every process calls it: one that reads the directory late sees what the first has
    just written, and no change.

    Args:
        directory, run, tokenizer: see `write`.
        changed: bool, whether this process saw another run, or none.
    """
    if changed and jax.process_index() == 0:
        write(directory, run, tokenizer)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("run")


def check_unchanged(before, now, accept_changes=False):
    """Whether a run may be resumed with other settings than it began with.

    Args:
        before, now: dicts, see `write`.
        accept_changes: bool, whether settings may change that the course depends on.

    Returns:
        List of lines that say what changes.

    Raises:
        ValueError: if something changes that must not, or was not accepted.
    """
    before, now = ({"kind": PRETRAINING, **run} for run in (before, now))
    changed = {
        name: (before[name], now[name])
        for name in ("kind", "preset", "architecture", "data")
        if before[name] != now[name]
    }
    if changed:
        raise ValueError(
            "The run in this directory is another one: "
            + "; ".join(f"{k} was {a} and is {b}" for k, (a, b) in changed.items())
            + ". Name another output directory."
        )
    old = {name: entry["value"] for name, entry in before["recipe"].items()}
    new = {name: entry["value"] for name, entry in now["recipe"].items()}
    lines = {
        name: f"{name} was {old.get(name)} and is {new[name]}"
        for name in new
        if old.get(name) != new[name]
    }
    fixed = [line for name, line in lines.items() if name in _FIXED]
    if fixed:
        raise ValueError(
            f"The run in this directory began otherwise: {'; '.join(fixed)}. Tokens "
            "would be repeated or left out, or moments would be of another kind. Name "
            "another output directory."
        )
    course = [line for name, line in lines.items() if name not in _FREE]
    if course and not accept_changes:
        raise ValueError(
            f"The run in this directory has other settings: {'; '.join(course)}. Give "
            "the same ones, or --accept-changes to go on with these from here on."
        )
    return list(lines.values())


def mixture_from(before, chosen, step, accept_changes=False):
    """The mixture of a resumed run: its own, changed where it was asked to.

    Args:
        before: dict, see `read`.
        chosen: `mixture.Mixture` that is asked for now.
        step: int, from where on other weights count.
        accept_changes: bool.

    Returns:
        The mixture, and a list of lines that say what changes.

    Raises:
        ValueError: if the weights are others, and that was not accepted.
    """
    own = mixtures.from_json(before["mixture"])
    weights = chosen.schedule[-1][1]
    if _same(own.schedule[-1][1], weights):
        return own, []
    if not accept_changes:
        raise ValueError(
            f"The run in this directory mixes its sources by {own.schedule[-1][1]}, "
            f"and {weights} is asked for. Give the same ones, or --accept-changes to "
            "go on with these from here on."
        )
    line = f"the sources are mixed by {weights} from step {step} on"
    return own.changed(step, weights), [line]


def _same(weights, others):
    # They are divided by their sum, and rounded, each time that they are read.
    return weights.keys() == others.keys() and all(
        math.isclose(weights[name], others[name], rel_tol=1e-9) for name in weights
    )


class Busy(RuntimeError):
    """Another process has the directory of a run."""


@contextlib.contextmanager
def locked(directory):
    """Keeps a second process from the same run.

    Raises:
        Busy: if another process has it.
    """
    if files.is_remote(directory):  # No lock is known there.
        yield
        return
    files.make_directory(directory)
    busy = Busy(
        f"Another process trains in {directory}. Wait for it, or name another output "
        "directory."
    )
    with locks.locked(files.join(directory, _LOCK), busy):
        yield
