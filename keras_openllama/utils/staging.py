"""Files and directories that appear at their place when they are whole, or not at all.

What is unfinished lies in a hidden directory beside the target, locked for as long as
its process lives. What a killed process left behind is removed by the next one that
writes to the same target on the same machine.

`files.atomic_write` replaces one file, local or remote, many times in a run. It has no
lock, which remote file systems lack, and refuses nothing; so the two share no more than
`sync_to_disk`.
"""

import contextlib
import os
import shutil
import socket
import tempfile
from pathlib import Path

from keras_openllama.utils.files import sync_to_disk
from keras_openllama.utils.locks import IS_POSIX, try_lock

_REPLACED = "replaced"  # The old directory, for the moment before the new one is there.


@contextlib.contextmanager
def staged(target, single_file=False, force=False, foreign_content=None):
    """Yields a path to write to, which becomes `target` when the block ends well.

    Args:
        target: path of the file or directory to be.
        single_file: bool, whether it is a file; the path yielded is then one that does
            not exist yet, and else an empty directory.
        force: bool, whether to replace what is there.
        foreign_content: function of the path of a directory that would be replaced. It
            returns what speaks against that, such as `"holds 'thesis.tex'"`, or `None`.
            Without it no directory is replaced unless it is empty.

    Raises:
        OSError: if the target exists and `force` is not set, or cannot be written.

    Example:

    ```python
    with staged("out") as directory:
        (directory / "config.json").write_text("{}")
    ```
    """
    target = Path(os.path.realpath(target))
    with _parents(target):
        _remove_abandoned(target)
        check_target(target, single_file, force, foreign_content)
        staging, lock = _make_staging(target)
        try:
            unfinished = staging / target.name
            if not single_file:
                unfinished.mkdir()
            yield unfinished
            _sync(unfinished)
            # It may have come meanwhile.
            check_target(target, single_file, force, foreign_content)
            if target.is_dir():
                os.rename(target, staging / _REPLACED)
            os.replace(unfinished, target)
        finally:
            _remove(staging, target)
            if lock is not None:
                os.close(lock)


def check_target(target, single_file=False, force=False, foreign_content=None):
    """Raises an `OSError` if `staged` would refuse the target."""
    target = Path(os.path.realpath(target))
    if target.is_dir():
        _check_directory(target, single_file, force, foreign_content)
    elif target.exists():
        if not target.is_file():
            raise OSError(f"{target} is neither a file nor a directory to replace.")
        if not force:
            raise _exists(target)
        if not single_file:
            raise NotADirectoryError(
                f"{target} is a file, and a directory is written. Choose another "
                "target."
            )


def _check_directory(target, single_file, force, foreign_content):
    if single_file:
        raise IsADirectoryError(
            f"{target} is a directory, and a file is written: name a file in it."
        )
    if os.path.ismount(target) or target == Path.cwd():
        what = "a mount point" if os.path.ismount(target) else "the current directory"
        raise OSError(
            f"{target} is {what}, in whose place no other directory can be put: name a "
            "directory in it."
        )
    if not any(target.iterdir()):
        return
    if not force or foreign_content is None:
        raise _exists(target)
    found = foreign_content(target)
    if found:
        raise FileExistsError(
            f"{target} is not replaced: it {found}, which no conversion writes. Remove "
            "it yourself, or choose another target."
        )


def _exists(target):
    return FileExistsError(
        f"{target} exists. Choose another target, or replace it with force=True "
        "(--force)."
    )


@contextlib.contextmanager
def _parents(target):
    """Makes the directories above the target, and removes them again if it fails."""
    made = [path for path in target.parents if not path.exists()]
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        for path in made:
            with contextlib.suppress(OSError):  # Somebody else has use for it.
                path.rmdir()
        raise


def _prefix(target):
    # By machine: on a network's file system, locks of others may not be seen.
    return f".{target.name}.unfinished-{socket.gethostname()}-"


def _make_staging(target):
    """A new directory beside the target, and the descriptor that holds its lock.

    The descriptor is `None` on Windows, where directories have no locks.
    """
    while True:
        staging = Path(tempfile.mkdtemp(prefix=_prefix(target), dir=target.parent))
        if not IS_POSIX:
            return staging, None
        # In between, another process may take it for an abandoned one.
        try:
            lock = os.open(staging, os.O_RDONLY)
        except FileNotFoundError:
            continue
        if try_lock(lock) is not False and staging.exists():
            return staging, lock
        os.close(lock)


def _remove_abandoned(target):
    if not IS_POSIX:  # Without locks, nothing tells whether a process still writes.
        return
    for path in target.parent.iterdir():
        if not path.name.startswith(_prefix(target)):
            continue
        with contextlib.suppress(OSError):  # Gone meanwhile.
            lock = os.open(path, os.O_RDONLY)
            if try_lock(lock):
                _remove(path, target)
            os.close(lock)


def _remove(staging, target):
    """Removes a staging directory, and puts back what had been replaced by nothing."""
    if (staging / _REPLACED).exists() and not target.exists():
        os.rename(staging / _REPLACED, target)
    shutil.rmtree(staging, ignore_errors=True)


def _sync(path):
    """Has the system put a file, or a directory's files, on the disk."""
    for name in [path, *path.rglob("*")] if path.is_dir() else [path]:
        sync_to_disk(name)
