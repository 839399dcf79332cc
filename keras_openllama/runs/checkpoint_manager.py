"""Checkpoints of a run: written beside the training, and known to be whole.

    checkpoints/1500/arrays/            what Orbax writes: variables, optimizer, guard
    checkpoints/1500/checkpoint.json    written last: SHA-256 of each file, and the run

Without `checkpoint.json` a directory is one whose writing was cut short. One whose
files do not match it is damaged: it is named, put aside, and the one before is taken.
"""

import concurrent.futures
import contextlib
import json
import logging
import os
import time

import jax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from keras_openllama.checkpoints.seal import (
    FORMAT,
    MARKER,
    check_file,
    parse_marker,
    sealed,
)
from keras_openllama.checkpoints.training_run import ARRAYS, DIRECTORY
from keras_openllama.utils import files
from keras_openllama.utils.background import run_in_background

_DAMAGED = ".damaged"
# Ours: how long process 0 waits for the checksums of the others, in seconds.
_PEERS_TIMEOUT = 600.0
_REMOVALS = 20  # Ours: of a failed save's files, which may come back.

_log = logging.getLogger(__name__)


class CheckpointError(Exception):
    """A checkpoint could not be written; those before it are untouched."""


class Checkpoints:
    """The checkpoints of a run's directory.

    One save is under way at a time, in the background; the training waits only while
    the arrays are copied from the devices. An error of the background is raised by the
    next call.

    Args:
        directory: string, the run's directory, seen by all processes.
        keep_last: int, how many of the newest are kept.
        milestone_every: int, checkpoints of these steps are kept for good; 0 for none.

    Example:

    ```python
    checkpoints = Checkpoints("runs/3b_v3", keep_last=2)
    found = checkpoints.restore_latest(abstract_state)
    checkpoints.save(1500, state, {"tokens": 6291456000})
    checkpoints.close()
    ```
    """

    def __init__(self, directory, keep_last=2, milestone_every=0):
        self.directory = files.join(directory, DIRECTORY)
        self._keep_last, self._milestone_every = keep_last, milestone_every
        self._orbax = None
        self._pending = self._saving_step = None
        files.make_directory(self.directory)

    # ----- Writing

    def save(self, step, state, info):
        """Begins to save; returns when the arrays are safe from what comes next.

        Args:
            step: int, steps done.
            state: dict of dicts of `jax.Array`.
            info: dict, what else to keep, as JSON.

        Raises:
            CheckpointError: if this save, or the one before, fails.
        """
        self.wait()
        path = self.path(step)
        try:
            if jax.process_index() == 0:
                self._remove(step)  # What a kill has left of it.
            _barrier(f"save-{step}")
            if self._orbax is None:
                self._orbax = ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler())
            arrays = files.join(os.path.abspath(path), ARRAYS)
            self._orbax.save(arrays, ocp.args.PyTreeSave(state))
        except Exception as error:
            self._give_up(step, error)
        self._saving_step = step
        self._pending = run_in_background(self._finish, step, info)

    def wait(self):
        """Waits until the save under way has ended.

        Raises:
            CheckpointError: if it has failed.
        """
        self.check(wait=True)

    def check(self, wait=False):
        """Raises the `CheckpointError` of a save that has failed meanwhile."""
        pending = self._pending
        if pending is None or not (wait or pending.done()):
            return
        self._pending = None
        try:
            pending.result()
        except Exception as error:
            self._give_up(self._saving_step, error)

    def close(self):
        """Waits for what is under way, and ends Orbax's threads."""
        try:
            self.wait()
        finally:
            if self._orbax is not None:
                with contextlib.suppress(Exception):  # Raised by `wait` already.
                    self._orbax.close()

    def _give_up(self, step, error):
        """Frees what the failed save takes of the disk, and raises."""
        orbax, self._orbax = self._orbax, None
        if orbax is not None:
            with contextlib.suppress(Exception):  # The same error once more.
                orbax.close()
        if jax.process_index() == 0:
            with contextlib.suppress(OSError):
                self._remove_for_good(step)
        raise CheckpointError(
            f"The checkpoint of step {step} could not be written to {self.directory}: "
            f"{error}. Those before it are untouched: {self.steps()}."
        ) from error

    def _finish(self, step, info):
        self._orbax.wait_until_finished()
        path, process = self.path(step), jax.process_index()
        sums = checksums(path, _part_of(process))
        if process:
            files.write_bytes(_sums_file(path, process), json.dumps(sums).encode())
            return
        for peer in range(1, jax.process_count()):
            sums.update(_read_when_there(_sums_file(path, peer)))
        marker = {"format": FORMAT, "step": step, **info, "files": sums}
        marker = sealed(json.loads(json.dumps(marker)))  # As it will be read.
        data = json.dumps(marker, indent=1).encode()
        files.write_bytes(files.join(path, MARKER), data)
        try:
            self._prune()
        except OSError as error:  # The new one is whole all the same.
            _log.warning("Old checkpoints could not be removed: %s", error)

    def _prune(self):
        """Removes what is not to be kept, and what earlier kills have left behind."""
        steps = self.steps()
        kept = {*steps[-self._keep_last :]}
        if self._milestone_every:
            kept |= {step for step in steps if step % self._milestone_every == 0}
        for step in self._numbers():
            if step not in kept and step < steps[-1]:
                self._remove(step)

    def _remove_for_good(self, step):
        # Where one write fails, TensorStore has others under way for a moment.
        for _ in range(_REMOVALS):
            self._remove(step)
            time.sleep(0.05)
            if not files.exists(self.path(step)):
                break

    def _remove(self, step):
        # The marker first: a directory half removed is no checkpoint.
        files.remove_file(files.join(self.path(step), MARKER))
        files.remove_directory(self.path(step))

    # ----- Reading

    def path(self, step):
        """The directory of a step's checkpoint."""
        return files.join(self.directory, str(step))

    def steps(self):
        """Steps of which there is a checkpoint, in order; damaged ones may be among."""
        return [
            step
            for step in self._numbers()
            if files.exists(files.join(self.path(step), MARKER))
        ]

    def _numbers(self):
        names = files.list_directory(self.directory)
        return sorted(int(name) for name in names if name.isdecimal())

    def restore_latest(self, like):
        """Reads the newest checkpoint that is whole.

        Those that are not are named, and put aside under another name.

        Args:
            like: function from a checkpoint's marker, a dict, to a tree of
                `jax.ShapeDtypeStruct` with shardings, as the arrays are wanted.

        Returns:
            The marker and the arrays, or `None` if there is no checkpoint at all.

        Raises:
            CheckpointError: if there are checkpoints, and none is whole.
        """
        steps = self.steps()
        for step in {*self._numbers()} - {*steps}:
            _log.warning(
                "The checkpoint of step %d was cut short while it was written (it has "
                "no %s), and is not used.",
                *(step, MARKER),
            )
        for step in reversed(steps):
            problem = self._problem(step)
            if problem is None:
                marker = read_marker(self.path(step))
                return marker, read_arrays(self.path(step), like(marker))
            _log.warning("The checkpoint of step %d is damaged: %s", step, problem)
            if jax.process_index() == 0:
                self._put_aside(step)
            _barrier(f"aside-{step}")
        # Those of an earlier call, too: else the same command would begin anew.
        names = files.list_directory(self.directory)
        if any(name.endswith(_DAMAGED) for name in names):
            raise CheckpointError(
                f"None of the checkpoints in {self.directory} is whole. They are there "
                f"as STEP{_DAMAGED}. To begin anew, name another output directory."
            )
        return None

    def _put_aside(self, step):
        aside = self.path(step) + _DAMAGED
        files.remove_directory(aside)
        os.replace(self.path(step), aside)

    def _problem(self, step):
        """What is wrong with a checkpoint; the processes share the reading."""
        try:
            marker = read_marker(self.path(step))
            check_files(self.path(step), marker, *_processes())
            problem = None
        except (OSError, ValueError) as error:
            problem = str(error)
        if jax.process_count() > 1:
            good = multihost_utils.process_allgather(jax.numpy.array(problem is None))
            if not good.all():
                problem = problem or "another process cannot read its part of it."
        return problem


def read_marker(path):
    """What is known of a checkpoint.

    Args:
        path: string, its directory.

    Returns:
        Dict: `format`, `step`, `files`, and what was saved as `info`.

    Raises:
        OSError: if there is none.
        ValueError: if it is damaged or of another format.
    """
    file = files.join(path, MARKER)
    return parse_marker(files.read_bytes(file), file)


def check_files(path, marker, process=0, processes=1):
    """Compares the files of a checkpoint with their checksums.

    Args:
        path: string, its directory.
        marker: dict, see `read_marker`.
        process, processes: ints, which share of the files to look at.

    Raises:
        OSError: if a file is missing or cannot be read.
        ValueError: if a file is not what was written.
    """
    names = sorted(marker["files"])[process::processes]

    def check(name):
        file, expected = files.join(path, name), marker["files"][name]
        size, _ = files.size_and_mtime(file)
        check_file(file, expected, size, lambda: files.sha256(file))

    with concurrent.futures.ThreadPoolExecutor() as pool:
        list(pool.map(check, names))


def read_arrays(path, like):
    """Reads arrays of a checkpoint into the shardings wanted.

    Args:
        path: string, its directory.
        like: tree of `jax.ShapeDtypeStruct` with shardings. What it leaves out of the
            checkpoint is not read.

    Returns:
        The tree of `jax.Array`.

    Raises:
        ValueError: if the checkpoint lacks an array, or has it in another shape.
    """
    handler = ocp.PyTreeCheckpointHandler()
    with contextlib.closing(ocp.Checkpointer(handler)) as checkpointer:
        restore = ocp.args.PyTreeRestore(
            item=like,
            restore_args=ocp.checkpoint_utils.construct_restore_args(like),
            partial_restore=True,
        )
        arrays = files.join(os.path.abspath(path), ARRAYS)
        found = checkpointer.restore(arrays, restore)
    missing = [  # Which Orbax leaves as they were asked for.
        jax.tree_util.keystr(keys, simple=True, separator="/")
        for keys, leaf in jax.tree_util.tree_leaves_with_path(found)
        if not isinstance(leaf, jax.Array)
    ]
    if missing:
        raise ValueError(f"The checkpoint {path} has no arrays {', '.join(missing)}.")
    return found


def checksums(path, belongs):
    """Size and SHA-256 of files below a directory.

    Args:
        path: string.
        belongs: function from a file's name below `path` to whether it is wanted.

    Returns:
        Dict by name of dicts of `"bytes"` and `"sha256"`.
    """
    start = len(path) + 1
    names = [file[start:] for file in files.list_files(path) if belongs(file[start:])]

    def look(name):
        file = files.join(path, name)
        size, _ = files.size_and_mtime(file)
        return name, {"bytes": size, "sha256": files.sha256(file)}

    with concurrent.futures.ThreadPoolExecutor() as pool:
        return dict(pool.map(look, names))


def _part_of(process):
    """Which files of a checkpoint a process looks after: those that it has written."""
    own = f"{ARRAYS}/ocdbt.process_{process}/"

    def belongs(name):
        if name.startswith(f"{ARRAYS}/ocdbt.process_"):
            return name.startswith(own)
        return process == 0 and name.startswith(f"{ARRAYS}/")

    return belongs


def _sums_file(path, process):
    return files.join(path, f"checksums-{process}.json")


def _read_when_there(path):
    deadline = time.monotonic() + _PEERS_TIMEOUT
    while not files.exists(path):
        if time.monotonic() > deadline:
            raise TimeoutError(f"{path} did not come in {_PEERS_TIMEOUT:.0f} seconds.")
        time.sleep(0.05)
    return json.loads(files.read_bytes(path))


def _processes():
    return jax.process_index(), jax.process_count()


def _barrier(name):
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)
