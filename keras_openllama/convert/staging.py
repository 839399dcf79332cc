"""Files and directories that appear at their place when they are whole, or not at all.

What is unfinished lies in a hidden directory beside the target, locked for as long as
its process lives. What a killed process left behind is removed by the next one that
writes to the same target.
"""

import contextlib
import fcntl
import os
import shutil
import tempfile
from pathlib import Path

_MODEL_FILE = "config.json"  # What a directory has that may be replaced.
_REPLACED = "replaced"  # The old directory, for the moment before the new one is there.


@contextlib.contextmanager
def staged(target, single_file=False, force=False):
    """Yields a path to write to, which becomes `target` when the block ends well.

    Args:
        target: path of the file or directory to be.
        single_file: bool, whether it is a file; the path yielded is then one that does
            not exist yet, and else an empty directory.
        force: bool, whether to replace what is there.

    Raises:
        OSError: if the target exists and `force` is not set, or cannot be written.

    Example:

    ```python
    with staged("out") as directory:
        (directory / "config.json").write_text("{}")
    ```
    """
    target = Path(os.path.realpath(target))
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(target)
    check_target(target, single_file, force)
    staging = Path(tempfile.mkdtemp(prefix=_prefix(target), dir=target.parent))
    try:
        with _locked(staging):
            unfinished = staging / target.name
            if not single_file:
                unfinished.mkdir()
            yield unfinished
            _sync(unfinished)
            if target.is_dir():
                os.rename(target, staging / _REPLACED)
            os.replace(unfinished, target)
    finally:
        _remove(staging, target)


def check_target(target, single_file=False, force=False):
    """Raises an `OSError` if `staged` would refuse the target."""
    target = Path(target)
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        if single_file and target.is_dir():
            raise IsADirectoryError(f"{target} is a directory, and a file is written.")
        return
    if not force:
        raise FileExistsError(
            f"{target} exists. Choose another target, or replace it with force=True "
            "(--force)."
        )
    if target.is_dir() and single_file:
        raise IsADirectoryError(f"{target} is a directory, and a file is written.")
    if not single_file and not (target / _MODEL_FILE).is_file():
        raise FileExistsError(
            f"{target} is not replaced: it holds no {_MODEL_FILE}, so it is no model's "
            "directory. Remove it yourself, or choose another target."
        )


def _prefix(target):
    return f".{target.name}.unfinished-"


@contextlib.contextmanager
def _locked(directory):
    """Holds the directory's lock, which the system lets go when the process ends."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def _remove_abandoned(target):
    for path in target.parent.iterdir():
        if path.name.startswith(_prefix(target)):
            with (
                contextlib.suppress(OSError),
                _locked(path),
            ):  # Locked: its owner lives.
                _remove(path, target)


def _remove(staging, target):
    """Removes a staging directory, and puts back what had been replaced by nothing."""
    if (staging / _REPLACED).exists() and not target.exists():
        os.rename(staging / _REPLACED, target)
    shutil.rmtree(staging, ignore_errors=True)


def _sync(path):
    """Has the system put a file, or a directory's files, on the disk."""
    for name in [path, *path.rglob("*")] if path.is_dir() else [path]:
        descriptor = os.open(name, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
