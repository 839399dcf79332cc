"""Atomic creation of files and directories.

Unfinished output is in a hidden directory next to the target, which is locked while its
process lives. The next process that writes to the same target on the same machine
removes what a killed process left behind.

`files.atomic_write` replaces one file, local or remote, many times in a run. It has no
lock, which remote file systems lack, and never rejects a target. So the two share only
`sync_to_disk`.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeAlias

from keras_openllama.utils.files import sync_to_disk
from keras_openllama.utils.locks import IS_POSIX, try_lock
from keras_openllama.utils.types import PathLike

_INSIDE = "files"  # Part of the name of a staging directory inside its target.
_SCRATCH = "keras_openllama"  # Part of the name of a directory for temporary files.
_REPLACED = "replaced"  # Name of the old directory until the new one is in place.
# Returns why a directory must not be replaced, such as "holds 'thesis.tex'", or `None`.
ForeignContent: TypeAlias = Callable[[Path], str | None]


@contextlib.contextmanager
def staged(
    target: PathLike,
    single_file: bool = False,
    force: bool = False,
    foreign_content: ForeignContent | None = None,
) -> Iterator[Path]:
    """Yields a path to write to, which becomes `target` if the block succeeds.

    Args:
        target: Path of the file or directory to create.
        single_file: Whether the target is a file. The yielded path is then a path that
            does not exist, otherwise an empty directory.
        force: Whether to replace an existing target.
        foreign_content: Function of the path of a directory to replace. It returns
            a reason not to, such as `"holds 'thesis.tex'"`, or `None`. Without it,
            only empty directories are replaced.

    Yields:
        The path to write to.

    Raises:
        OSError: If the target exists and must not be replaced, or cannot be written.

    Example:
        >>> with staged("out") as directory:
        ...     _ = (directory / "config.json").write_text("{}")
        >>> os.listdir("out")
        ['config.json']
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
            # Another process may have created the target in the meantime.
            check_target(target, single_file, force, foreign_content)
            if target.is_dir():
                os.rename(target, staging / _REPLACED)
            os.replace(unfinished, target)
        finally:
            _remove(staging, target)
            if lock is not None:
                os.close(lock)


@contextlib.contextmanager
def staged_files(directory: PathLike, target: PathLike | None = None) -> Iterator[Path]:
    """Yields a directory whose files move to another one if the block succeeds.

    Unlike with `staged`, the other directory may exist, and the rest of it stays as it
    is.

    Args:
        directory: Path of the directory, which is created if it does not exist.
        target: What errors name: the directory by default, or a file in it.

    Yields:
        The path of an empty directory on the same disk.

    Raises:
        OSError: If the files cannot be written. The directory is then unchanged.

    Example:
        >>> with staged_files("out") as unfinished:
        ...     _ = (unfinished / "config.json").write_text("{}")
        >>> os.listdir("out")
        ['config.json']
    """
    directory = Path(os.path.realpath(directory))
    with errors_name_target(target or directory):
        if not directory.exists():
            with staged(directory) as unfinished:
                yield unfinished
        else:
            with _staging_inside(directory) as unfinished:
                yield unfinished


@contextlib.contextmanager
def scratch_directory(parent: PathLike) -> Iterator[Path]:
    """Yields an empty directory that is removed when the block ends.

    If the process is killed, the next call with the same parent removes it.

    Args:
        parent: Path of an existing directory.

    Yields:
        The path of a directory that only this user can read.

    Raises:
        OSError: If it cannot be created.

    Example:
        >>> with scratch_directory(".") as directory:
        ...     _ = (directory / "weights").write_text("large")
        >>> os.listdir(".")
        []
    """
    target = Path(parent, _SCRATCH)
    _remove_abandoned(target)
    directory, lock = _make_staging(target)
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)
        if lock is not None:
            os.close(lock)


@contextlib.contextmanager
def errors_name_target(target: PathLike) -> Iterator[None]:
    """Makes system errors name the target instead of the staging directory.

    Args:
        target: Path of the file or directory that is written.

    Raises:
        OSError: In place of a system error of the block.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None:  # Raised by this package, with a complete message.
            raise
        raise OSError(
            error.errno,
            f"{target} cannot be written: {error.strerror}. It was not changed",
        ) from error


@contextlib.contextmanager
def _staging_inside(directory):
    _remove_abandoned(directory / _INSIDE)
    staging, lock = _make_staging(directory / _INSIDE)
    try:
        yield staging
        _sync(staging)
        for path in sorted(p for p in staging.rglob("*") if not p.is_dir()):
            target = directory / path.relative_to(staging)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def check_target(
    target: PathLike,
    single_file: bool = False,
    force: bool = False,
    foreign_content: ForeignContent | None = None,
) -> None:
    """Checks that `staged` would accept a target.

    Args:
        target: See `staged`.
        single_file: See `staged`.
        force: See `staged`.
        foreign_content: See `staged`.

    Raises:
        OSError: If the target exists and must not be replaced.

    Example:
        >>> check_target("new_directory")
    """
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
                f"{target} is a file, but the output is a directory. Choose another "
                "target."
            )


def _check_directory(target, single_file, force, foreign_content):
    if single_file:
        raise IsADirectoryError(
            f"{target} is a directory, but the output is a file: name a file in it."
        )
    if os.path.ismount(target) or target == Path.cwd():
        what = "a mount point" if os.path.ismount(target) else "the current directory"
        raise OSError(
            f"{target} is {what}, which cannot be replaced: name a directory in it."
        )
    if not any(target.iterdir()):
        return
    if not force or foreign_content is None:
        raise _exists(target)
    found = foreign_content(target)
    if found:
        raise FileExistsError(
            f"{target} is not replaced: it {found}, which is not part of a model. "
            "Remove it yourself, or choose another target."
        )


def _exists(target):
    return FileExistsError(
        f"{target} exists. Choose another target, or replace it with force=True "
        "(--force)."
    )


@contextlib.contextmanager
def _parents(target):
    """Creates the parent directories; removes them again if the block fails."""
    made = [path for path in target.parents if not path.exists()]
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        for path in made:
            with contextlib.suppress(OSError):  # Another process uses it.
                path.rmdir()
        raise


def _prefix(target):
    # With the machine's name: locks of other machines may be invisible on a network
    # file system.
    return f".{target.name}.unfinished-{socket.gethostname()}-"


def _make_staging(target):
    """Creates a directory next to the target; returns it and its lock's descriptor.

    The descriptor is `None` on Windows, where directories have no locks.
    """
    while True:
        staging = Path(tempfile.mkdtemp(prefix=_prefix(target), dir=target.parent))
        if not IS_POSIX:
            return staging, None
        # Before it is locked, another process may remove it as abandoned.
        try:
            lock = os.open(staging, os.O_RDONLY)
        except FileNotFoundError:
            continue
        if try_lock(lock) is not False and staging.exists():
            return staging, lock
        os.close(lock)


def _remove_abandoned(target):
    if not IS_POSIX:  # Without locks, the process may still be alive.
        return
    for path in target.parent.iterdir():
        letters = path.name.removeprefix(_prefix(target))
        # With a dash, it is that of a host with a longer name.
        if letters == path.name or "-" in letters:
            continue
        with contextlib.suppress(OSError):  # Another process removed it.
            lock = os.open(path, os.O_RDONLY)
            try:
                if try_lock(lock):
                    _remove(path, target)
            finally:
                os.close(lock)


def _remove(staging, target):
    """Removes a staging directory; restores the old target if nothing replaced it."""
    if (staging / _REPLACED).exists() and not target.exists():
        os.rename(staging / _REPLACED, target)
    shutil.rmtree(staging, ignore_errors=True)


def _sync(path):
    """Syncs a file, or all files of a directory, to the disk."""
    for name in [path, *path.rglob("*")] if path.is_dir() else [path]:
        sync_to_disk(name)
