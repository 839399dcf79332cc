"""The directory of a run: its description (`run.json`), settings checks and lock."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import math
import platform
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from jax.experimental import multihost_utils

import keras_openllama
from keras_openllama.checkpoints.training_run import RUN, RUN_FORMAT, TOKENIZER
from keras_openllama.data import mixture as mixtures
from keras_openllama.utils import files, locks
from keras_openllama.utils.types import PathLike

PRETRAINING, FINETUNING = "pretraining", "finetuning"

_LOCK = ".lock"
# These settings decide which tokens a step reads; changing one would repeat or omit
# data. The optimizer is fixed too, because another one has other moments.
_FIXED = (
    *("batch_size", "sequence_length", "seed", "packing", "mask_documents"),
    "optimizer",
    # Of fine-tuning: its sequences, and the kinds and shapes of trainable variables.
    *("pack", "chat_template", "lora_rank", "lora_targets", "quantization"),
)
# These settings do not affect the numerical results of a run.
_FREE = (
    *("meshes", "planned", "micro_batches", "rematerialize"),
    *("milestone_every", "save_every", "keep_last"),
    *("validate_every", "validation_batches", "sample_every"),
    "max_skipped_steps",
    "mixture",  # `resumed_mixture` compares the weights instead.
)


def installed_versions() -> dict[str, str]:
    """Returns the versions of Python and of the packages that a run depends on.

    Returns:
        Version by package. Packages that are not installed are omitted; fine-tuning
        does not need Grain.
    """
    found = {
        "keras_openllama": keras_openllama.__version__,
        "python": platform.python_version(),
    }
    for name in ("jax", "jaxlib", "keras", "keras-hub", "orbax-checkpoint", "grain"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def read_run(directory: PathLike) -> dict[str, Any] | None:
    """Reads the description of a run.

    Args:
        directory: The run's directory.

    Returns:
        The dict that `write_run` wrote, or `None` if the directory holds no run.

    Raises:
        ValueError: if the file is damaged, or of another format.

    Example:
        >>> read_run("runs/3b_v3") is None
        True
    """
    path = files.join(directory, RUN)
    if not files.exists(path):
        return None
    try:
        run = json.loads(files.read_bytes(path))
        if "format" not in run and "lora_rank" in run:
            raise _UnsupportedRunError
        if run["format"] != RUN_FORMAT:
            raise ValueError(f"its format is {run['format']}, not {RUN_FORMAT}")
    except _UnsupportedRunError:
        raise ValueError(
            f"{directory} holds a fine-tuning run of a version before 0.2.0, which "
            "this version cannot resume. If that run was complete, load its results: "
            f"{directory}/adapters (`lm.load_adapters`) or {directory}/model "
            "(`from_preset`). Otherwise start again in another output directory, or "
            "finish it with the version that started it."
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged: {error!r}.") from error
    if run.get("recipe", {}).pop("int8", {}).get("value"):
        # With `--int8`, version 0.2 rounded weights in another way.
        run["recipe"]["quantization"] = {"value": "int8 of version 0.2"}
    return run


class _UnsupportedRunError(Exception):
    """A fine-tuning run whose checkpoint is `state.npz`."""


def write_run(directory: PathLike, run: Mapping[str, Any], tokenizer: bytes) -> None:
    """Writes the description of a run, and its tokenizer.

    Args:
        directory: The run's directory.
        run: JSON-serializable dict: `preset`, `recipe`, `architecture`, `data`, and
            `tokenizer`, the settings of a tokenizer that has other than the defaults.
        tokenizer: The SentencePiece model.
    """
    files.write_bytes(files.join(directory, TOKENIZER), tokenizer)
    run = {"format": RUN_FORMAT, **run, "versions": installed_versions()}
    data = json.dumps(run, indent=1).encode()
    files.write_bytes(files.join(directory, RUN), data)


def read_and_check_run(
    directory: PathLike, now: Mapping[str, Any], accept_changes: bool = False
) -> tuple[dict[str, Any] | None, list[str]]:
    """Reads the run in a directory, and checks that it may be resumed.

    Args:
        directory: The run's directory.
        now: See `check_settings`.
        accept_changes: See `check_settings`.

    Returns:
        The run, or `None` if the directory holds none; and the changes, see
        `check_settings`.

    Raises:
        ValueError: if the file is damaged, a change is impossible, or was not accepted.
    """
    before = read_run(directory)
    if before is None:
        return None, []
    return before, check_settings(before, now, accept_changes)


def write_run_once(
    directory: PathLike,
    run: Mapping[str, Any],
    tokenizer: bytes,
    before: Mapping[str, Any] | None,
    changes: list[str],
    log: Callable[[str], None],
) -> None:
    """Logs the changes of a run, and calls `write_run` if it is new or changed.

    Only process 0 writes; the others wait. Every process must call it, whatever it
    found before: a process that reads the directory late finds what process 0 has just
    written, and sees no change.

    Args:
        directory: The run's directory.
        run: See `write_run`.
        tokenizer: See `write_run`.
        before: The run that this process found in the directory, or `None`.
        changes: A line for each setting that changes.
        log: Function that logs a line.
    """
    for line in changes:
        log(f"Changed: {line}.")
    if (before is None or changes) and jax.process_index() == 0:
        write_run(directory, run, tokenizer)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("run")


def check_settings(
    before: Mapping[str, Any], now: Mapping[str, Any], accept_changes: bool = False
) -> list[str]:
    """Checks that a run may be resumed with the current settings.

    Args:
        before: The run in the directory, see `read_run`.
        now: The run as it is requested now, see `write_run`.
        accept_changes: Whether settings that affect the results may change.

    Returns:
        A line for each setting that changes.

    Raises:
        ValueError: if a change is impossible, or was not accepted.
    """
    before, now = ({"kind": PRETRAINING, **run} for run in (before, now))
    changed = {
        name: (before[name], now[name])
        for name in ("kind", "preset", "architecture", "data")
        if before[name] != now[name]
    }
    if changed:
        raise ValueError(
            "The directory holds a different run: "
            + "; ".join(f"{k} was {a} and is {b}" for k, (a, b) in changed.items())
            + ". Choose another output directory."
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
            "The run in this directory was started with settings that cannot change: "
            f"{'; '.join(fixed)}. Tokens would be repeated or omitted, or the "
            "checkpoint's variables would not match. Choose another output directory."
        )
    unaccepted = [line for name, line in lines.items() if name not in _FREE]
    if unaccepted and not accept_changes:
        raise ValueError(
            "The run in this directory has other settings: "
            f"{'; '.join(unaccepted)}. Pass the same ones, or --accept-changes to "
            "resume with the new ones."
        )
    return list(lines.values())


def resumed_mixture(
    before: Mapping[str, Any],
    chosen: mixtures.Mixture,
    step: int,
    accept_changes: bool = False,
) -> tuple[mixtures.Mixture, list[str]]:
    """Returns the mixture of a resumed run: its own, with any accepted change.

    Args:
        before: The run in the directory, see `read_run`.
        chosen: The mixture that is requested now.
        step: The first step that new weights apply to.
        accept_changes: Whether the weights may change.

    Returns:
        The mixture, and a line for each change.

    Raises:
        ValueError: if the weights differ, and that was not accepted.
    """
    own = mixtures.mixture_from_json(before["mixture"])
    weights = chosen.schedule[-1][1]
    if _same_weights(own.schedule[-1][1], weights):
        return own, []
    if not accept_changes:
        raise ValueError(
            "The run in this directory has the mixture weights "
            f"{own.schedule[-1][1]}, and {weights} are requested. Pass the same ones, "
            "or --accept-changes to resume with the new ones."
        )
    line = f"the mixture weights are {weights} from step {step} on"
    return own.with_weights(step, weights), [line]


def _same_weights(weights, others):
    # Reading a mixture normalizes its weights, which rounds them each time.
    return weights.keys() == others.keys() and all(
        math.isclose(weights[name], others[name], rel_tol=1e-9) for name in weights
    )


class RunBusyError(RuntimeError):
    """Another process holds the lock of a run's directory."""


@contextlib.contextmanager
def lock_directory(directory: PathLike) -> Iterator[None]:
    """Holds the lock of a run's directory; a remote directory is not locked.

    Args:
        directory: The run's directory; created if it does not exist.

    Raises:
        RunBusyError: if another process holds the lock.
    """
    if files.is_remote(directory):  # Object stores have no locks.
        yield
        return
    files.make_directory(directory)
    busy = RunBusyError(
        f"Another process trains in {directory}. Wait for it, or choose another "
        "output directory."
    )
    with locks.locked(files.join(directory, _LOCK), busy):
        yield
