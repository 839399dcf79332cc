"""Checkpoints of a run: saved asynchronously and verified by checksums.

    checkpoints/1500/arrays/            written by Orbax: the variables of the model and
                                        of the optimizer, and `guard`, the running mean
                                        by which spikes of the loss are detected
    checkpoints/1500/checkpoint.json    the marker, written last: SHA-256 of each file,
                                        and the description of the run

A directory without `checkpoint.json` is an incomplete checkpoint. If a file does not
match its checksum, the checkpoint is damaged: a warning names the file, the directory
is renamed, and the previous checkpoint is restored.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import logging
import os
import time
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import jax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from keras_openllama.checkpoints.seal import (
    FORMAT,
    MARKER,
    add_checksum,
    check_file,
    parse_marker,
)
from keras_openllama.checkpoints.training_run import ARRAYS, DIRECTORY
from keras_openllama.utils import files
from keras_openllama.utils.background import run_in_background
from keras_openllama.utils.types import PathLike

_DAMAGED = ".damaged"
# Heuristic: seconds that process 0 waits for the checksums of the other processes.
_PEERS_TIMEOUT = 600.0
# Heuristic: attempts to remove a failed save, whose files may reappear.
_REMOVAL_ATTEMPTS = 20

_log = logging.getLogger(__name__)


class CheckpointError(Exception):
    """A checkpoint could not be written or restored; the others are unchanged."""


class CheckpointManager:
    """Saves, restores and removes the checkpoints of a run.

    One save runs at a time, in a background thread; training waits only while the
    arrays are copied from the devices. If the save fails, the next call raises its
    error.

    Args:
        directory: The run's directory, shared by all processes.
        keep_last: Number of most recent checkpoints to retain.
        milestone_every: Checkpoints of multiples of this step are never removed; 0
            disables this.

    Example:
        >>> import jax
        >>> checkpoints = CheckpointManager("runs/3b_v3", keep_last=2)
        >>> arrays = {"model": {"scale": jax.numpy.ones(4)}}
        >>> checkpoints.save(1500, arrays, {"tokens": 64})
        >>> checkpoints.wait()
        >>> checkpoints.steps()
        [1500]
        >>> checkpoints.close()
    """

    def __init__(
        self, directory: PathLike, keep_last: int = 2, milestone_every: int = 0
    ):
        self.directory = files.join(directory, DIRECTORY)
        self._keep_last, self._milestone_every = keep_last, milestone_every
        self._orbax = None
        self._pending = self._saving_step = None
        files.make_directory(self.directory)

    # ----- Saving

    def save(
        self, step: int, state: Mapping[str, Mapping[str, Any]], info: Mapping[str, Any]
    ) -> None:
        """Starts to save; returns as soon as the arrays may be overwritten.

        Args:
            step: Steps done.
            state: Arrays of JAX or NumPy, by part and name.
            info: JSON-serializable dict, stored in the checkpoint's metadata file
                (`checkpoint.json`).

        Raises:
            CheckpointError: if this save fails to start, or the previous one failed.
        """
        self.wait()
        path = self.path(step)
        try:
            if jax.process_index() == 0:
                self._remove(step)  # Incomplete files of a killed process.
            _barrier(f"save-{step}")
            if self._orbax is None:
                self._orbax = ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler())
            arrays = files.join(os.path.abspath(path), ARRAYS)
            self._orbax.save(arrays, ocp.args.PyTreeSave(state))
        except Exception as error:
            self._clean_up_and_raise(step, error)
        self._saving_step = step
        self._pending = run_in_background(self._complete_checkpoint, step, info)

    def wait(self) -> None:
        """Waits until the pending save has finished.

        Raises:
            CheckpointError: if it failed.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return
        try:
            pending.result()
        except Exception as error:
            self._clean_up_and_raise(self._saving_step, error)

    def raise_if_failed(self) -> None:
        """Raises the error of the background save, if it has failed by now.

        Raises:
            CheckpointError: if the save failed.
        """
        if self._pending is not None and self._pending.done():
            self.wait()

    def close(self) -> None:
        """Waits for the pending save and stops Orbax's threads.

        Raises:
            CheckpointError: if the save failed.
        """
        try:
            self.wait()
        finally:
            if self._orbax is not None:
                with contextlib.suppress(Exception):  # `wait` has already raised it.
                    self._orbax.close()

    def _clean_up_and_raise(self, step: int, error: Exception) -> NoReturn:
        """Closes Orbax, removes the files of a failed save, and raises."""
        orbax, self._orbax = self._orbax, None
        if orbax is not None:
            with contextlib.suppress(Exception):  # Orbax raises the same error again.
                orbax.close()
        if jax.process_index() == 0:
            with contextlib.suppress(OSError):
                self._remove_repeatedly(step)
        steps = self.steps()
        resume = f"resume from step {steps[-1]}" if steps else "start again"
        raise CheckpointError(
            f"The checkpoint of step {step} could not be written to {self.directory}: "
            f"{error}. Earlier checkpoints are unchanged: {steps}. Free space or "
            f"repair the directory, and run the same command to {resume}."
        ) from error

    def _complete_checkpoint(self, step, info):
        """Waits for the arrays of this process; process 0 then writes the marker."""
        self._orbax.wait_until_finished()
        path, process = self.path(step), jax.process_index()
        sums = compute_checksums(path, _written_by(process))
        if process:
            files.write_bytes(_checksums_file(path, process), json.dumps(sums).encode())
            return
        for peer in range(1, jax.process_count()):
            sums.update(_wait_for_checksums(path, peer))
        _write_marker(path, {"step": step, **info, "files": sums})
        try:
            self._prune()
        except OSError as error:  # The new checkpoint is complete.
            _log.warning("Old checkpoints could not be removed: %s", error)

    def _prune(self):
        """Removes old and incomplete checkpoints."""
        steps = self.steps()
        retained = {*steps[-self._keep_last :]}
        if self._milestone_every:
            retained |= {step for step in steps if step % self._milestone_every == 0}
        for step in self._directory_steps():
            if step not in retained and step < steps[-1]:
                self._remove(step)

    def _remove_repeatedly(self, step):
        # After a failed write, TensorStore's other writes continue for a moment.
        for _ in range(_REMOVAL_ATTEMPTS):
            self._remove(step)
            time.sleep(0.05)
            if not files.exists(self.path(step)):
                break

    def _remove(self, step):
        # The marker first: without it, the directory counts as incomplete.
        files.remove_file(files.join(self.path(step), MARKER))
        files.remove_directory(self.path(step))

    # ----- Restoring

    def path(self, step: int) -> str:
        """Returns the directory of a step's checkpoint."""
        return files.join(self.directory, str(step))

    def steps(self) -> list[int]:
        """Returns the steps of complete checkpoints in order; they may be damaged."""
        return [
            step
            for step in self._directory_steps()
            if files.exists(files.join(self.path(step), MARKER))
        ]

    def _directory_steps(self):
        names = files.list_directory(self.directory)
        return sorted(int(name) for name in names if name.isdecimal())

    def restore_latest(
        self, target: Any, before_read: Callable[[], None] | None = None
    ) -> tuple[dict[str, Any], Any] | None:
        """Restores the newest intact checkpoint.

        Damaged checkpoints are reported in a warning and renamed.

        Args:
            target: Tree of `jax.ShapeDtypeStruct` with shardings: the arrays to
                restore, which may be a part of those in the checkpoint.
            before_read: Called when an intact checkpoint was found, just before its
                arrays are read; for example to free the memory that they need.

        Returns:
            The marker and the tree of arrays, or `None` if there is no checkpoint.

        Raises:
            CheckpointError: if there are checkpoints, but none is intact.
            ValueError: if the checkpoint lacks an array of `target`, or has it in
                another shape.
        """
        steps = self.steps()
        for step in sorted({*self._directory_steps()} - {*steps}):
            _log.warning(
                "The checkpoint of step %d is incomplete (it has no %s) and is "
                "ignored.",
                step,
                MARKER,
            )
        for step in reversed(steps):
            marker, damage = self._verify(step)
            if damage is None:
                if before_read is not None:
                    before_read()
                return marker, read_arrays(self.path(step), target)
            _log.warning("The checkpoint of step %d is damaged: %s", step, damage)
            if jax.process_index() == 0:
                self._rename_damaged(step)
            _barrier(f"damaged-{step}")
        # Those renamed earlier count too: otherwise the run would silently restart.
        names = files.list_directory(self.directory)
        if any(name.endswith(_DAMAGED) for name in names):
            raise CheckpointError(
                f"All checkpoints in {self.directory} are damaged. They were renamed "
                f"to STEP{_DAMAGED}. To start a new run, choose another output "
                "directory."
            )
        return None

    def _rename_damaged(self, step):
        renamed = self.path(step) + _DAMAGED
        files.remove_directory(renamed)
        os.replace(self.path(step), renamed)

    def _verify(self, step):
        """Verifies a checkpoint; each process reads a share of the files.

        Returns:
            The marker and what is damaged, one of which is `None` on every process.
        """
        marker = damage = None
        process, num_processes = jax.process_index(), jax.process_count()
        try:
            marker = read_marker(self.path(step))
            verify_files(self.path(step), marker, process, num_processes)
        except (OSError, ValueError) as error:
            damage = str(error)
        if num_processes > 1:
            intact = multihost_utils.process_allgather(jax.numpy.array(damage is None))
            if not intact.all() and damage is None:
                damage = "another process could not verify its share of the files."
        return (marker, None) if damage is None else (None, damage)


def read_marker(path: PathLike) -> dict[str, Any]:
    """Reads the marker of a checkpoint, `checkpoint.json`.

    Args:
        path: Directory of the checkpoint.

    Returns:
        Dict with `format`, `step`, `files` (sizes and checksums), and the `info` that
        was saved.

    Raises:
        OSError: if there is none.
        ValueError: if it is damaged or of another format.
    """
    file = files.join(path, MARKER)
    return parse_marker(files.read_bytes(file), file)


def verify_files(
    path: PathLike, marker: Mapping[str, Any], process: int = 0, num_processes: int = 1
) -> None:
    """Compares the files of a checkpoint with their checksums.

    Args:
        path: Directory of the checkpoint.
        marker: See `read_marker`.
        process: Index of this process, which verifies its share of the files.
        num_processes: Number of processes that share the files.

    Raises:
        OSError: if a file is missing or cannot be read.
        ValueError: if size or checksum of a file differ.
    """
    names = sorted(marker["files"])[process::num_processes]

    def check(name):
        file, expected = files.join(path, name), marker["files"][name]
        size, _ = files.size_and_mtime(file)
        check_file(file, expected, size, lambda: files.sha256(file))

    with concurrent.futures.ThreadPoolExecutor() as pool:
        list(pool.map(check, names))


def read_arrays(path: PathLike, target: Any) -> Any:
    """Reads arrays of a checkpoint with the requested shardings.

    Args:
        path: Directory of the checkpoint.
        target: Tree of `jax.ShapeDtypeStruct` with shardings. Other arrays of the
            checkpoint are not read.

    Returns:
        The tree of `jax.Array`.

    Raises:
        ValueError: if the checkpoint lacks an array, or has it in another shape.
    """
    handler = ocp.PyTreeCheckpointHandler()
    with contextlib.closing(ocp.Checkpointer(handler)) as checkpointer:
        restore = ocp.args.PyTreeRestore(
            item=target,
            restore_args=ocp.checkpoint_utils.construct_restore_args(target),
            partial_restore=True,
        )
        arrays = files.join(os.path.abspath(path), ARRAYS)
        found = checkpointer.restore(arrays, restore)
    missing = [  # Orbax returns the struct of an array that is missing.
        jax.tree_util.keystr(keys, simple=True, separator="/")
        for keys, leaf in jax.tree_util.tree_leaves_with_path(found)
        if not isinstance(leaf, jax.Array)
    ]
    if missing:
        raise ValueError(
            f"The checkpoint {path} has no arrays {', '.join(missing)}. It was saved "
            "with another model or other settings of the optimizer."
        )
    return found


def compute_checksums(
    path: str, includes: Callable[[str], bool]
) -> dict[str, dict[str, Any]]:
    """Computes size and SHA-256 of the files below a directory.

    Args:
        path: The directory.
        includes: Function from a file's name, relative to `path`, to whether it is
            included.

    Returns:
        Dicts of `"bytes"` and `"sha256"`, by relative name.
    """
    start = len(path) + 1
    names = [file[start:] for file in files.list_files(path) if includes(file[start:])]

    def entry(name):
        file = files.join(path, name)
        size, _ = files.size_and_mtime(file)
        return name, {"bytes": size, "sha256": files.sha256(file)}

    with concurrent.futures.ThreadPoolExecutor() as pool:
        return dict(pool.map(entry, names))


def _written_by(process):
    """Predicate of the files of a checkpoint that a process has written."""
    own = f"{ARRAYS}/ocdbt.process_{process}/"

    def includes(name):
        if name.startswith(f"{ARRAYS}/ocdbt.process_"):
            return name.startswith(own)
        return process == 0 and name.startswith(f"{ARRAYS}/")

    return includes


def _checksums_file(path, process):
    return files.join(path, f"checksums-{process}.json")


def _wait_for_checksums(path, process):
    """Reads the checksums of another process's files, when it has written them."""
    file = _checksums_file(path, process)
    deadline = time.monotonic() + _PEERS_TIMEOUT
    while not files.exists(file):
        if time.monotonic() > deadline:
            raise TimeoutError(
                f"process {process} did not finish its part of the checkpoint, {file}, "
                f"within {_PEERS_TIMEOUT:.0f} seconds; see the log of that process"
            )
        time.sleep(0.05)
    return json.loads(files.read_bytes(file))


def _write_marker(path, content):
    """Writes the marker of a checkpoint, with its own checksum."""
    # The checksum is that of the marker in the form in which it is read.
    marker = json.loads(json.dumps({"format": FORMAT, **content}))
    data = json.dumps(add_checksum(marker), indent=1).encode()
    files.write_bytes(files.join(path, MARKER), data)


def _barrier(name):
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)
