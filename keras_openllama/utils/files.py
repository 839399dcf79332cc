"""Local files, and remote files of TensorFlow's file systems (`gs://…`).

TensorFlow is imported for paths with a scheme only: it takes seconds in each process.
"""

from __future__ import annotations

import contextlib
import functools
import glob as local_glob
import hashlib
import io
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from keras_openllama.utils.locks import IS_POSIX
from keras_openllama.utils.text_files import check_not_lfs_pointer
from keras_openllama.utils.types import PathLike


def is_remote(path: PathLike) -> bool:
    """Whether a path has a scheme, such as `gs://bucket/file`.

    Example:
        >>> is_remote("gs://bucket/file"), is_remote("/tmp/file")
        (True, False)
    """
    return "://" in str(path)


@functools.cache
def _gfile():
    import tensorflow

    return tensorflow.io.gfile


def join(directory: PathLike, *names: str) -> str:
    """Joins a directory and names with slashes.

    Example:
        >>> join("gs://bucket/", "data", "manifest.json")
        'gs://bucket/data/manifest.json'
    """
    return "/".join([str(directory).rstrip("/"), *names])


def open_binary(path: PathLike) -> BinaryIO:
    """Opens a file for reading bytes.

    Raises:
        OSError: If the file cannot be opened.
    """
    if not is_remote(path):
        return open(path, "rb")
    with _as_os_error(path):
        _gfile().stat(path)  # GFile opens the file lazily, at the first read.
    return io.BufferedReader(_Remote(path), 1 << 20)


class _Remote(io.RawIOBase):
    """Adapts a file of `tf.io.gfile` to `io.RawIOBase`."""

    def __init__(self, path):
        self._path, self._file = path, _gfile().GFile(path, "rb")

    def readable(self):
        return True

    def seekable(self):
        return True

    def readinto(self, buffer):
        with _as_os_error(self._path):
            data = self._file.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def seek(self, offset, whence=os.SEEK_SET):
        start = {
            os.SEEK_SET: lambda: 0,
            os.SEEK_CUR: self._file.tell,
            os.SEEK_END: self._file.size,
        }[whence]()
        self._file.seek(start + offset)
        return start + offset

    def tell(self):
        return self._file.tell()

    def close(self):
        self._file.close()
        super().close()


@contextlib.contextmanager
def _as_os_error(path):
    import tensorflow

    try:
        yield
    except tensorflow.errors.OpError as error:
        raise OSError(f"{path}: {error.message}") from error


def cache_directory(name: str) -> Path:
    """Returns the directory of a cache of this package, which may not exist.

    It lies in `$XDG_CACHE_HOME`, by default `~/.cache`.

    Args:
        name: What is cached, such as `"jax"` for compiled programs.

    Example:
        >>> cache_directory("jax").parts[-2:]
        ('keras_openllama', 'jax')
    """
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "keras_openllama" / name


def read_bytes(path: PathLike) -> bytes:
    """Returns the content of a file."""
    with open_binary(path) as file:
        return file.read()


def write_bytes(path: PathLike, data: bytes) -> None:
    """Writes a file atomically.

    Example:
        >>> write_bytes("greeting", b"hello")
        >>> read_bytes("greeting")
        b'hello'
    """
    with atomic_write(path) as unfinished:
        Path(unfinished).write_bytes(data)


@contextlib.contextmanager
def atomic_write(path: PathLike) -> Iterator[str]:
    """Yields a local path to write to; the finished file is then moved to `path`.

    If the block fails, `path` does not change.

    Args:
        path: Local or remote path of the file.

    Yields:
        The path to write to.

    Raises:
        OSError: If the file cannot be written.

    Example:
        >>> with atomic_write("greeting") as unfinished:
        ...     _ = Path(unfinished).write_text("hello")
        >>> read_bytes("greeting")
        b'hello'
    """
    if is_remote(path):
        with tempfile.TemporaryDirectory() as directory:
            unfinished = os.path.join(directory, "file")
            yield unfinished
            with _as_os_error(path):
                _gfile().copy(unfinished, path, overwrite=True)
        return
    # Hidden, with the process id: a killed process may have left another one.
    unfinished = join(os.path.dirname(path) or ".", f".{os.path.basename(path)}")
    unfinished += f".unfinished-{os.getpid()}"
    try:
        yield unfinished
        sync_to_disk(unfinished)
        os.replace(unfinished, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(unfinished)


def sync_to_disk(path: PathLike) -> None:
    """Flushes a local file or directory to the disk; directories not on Windows."""
    if not IS_POSIX and os.path.isdir(path):
        return
    descriptor = os.open(path, os.O_RDONLY if IS_POSIX else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_json_object(path: Path) -> dict[str, Any]:
    """Reads a local JSON file that contains an object.

    Args:
        path: Path of the file.

    Returns:
        The object.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it is not valid JSON, not an object, or a Git LFS pointer.

    Example:
        >>> _ = Path("config.json").write_text('{"num_layers": 26}')
        >>> read_json_object(Path("config.json"))
        {'num_layers': 26}
    """
    data = path.read_bytes()
    check_not_lfs_pointer(data, path)
    try:
        data = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(data, dict):
        raise ValueError(
            f"{path} must contain a JSON object. Received: {type(data).__name__}."
        )
    return data


def exists(path: PathLike) -> bool:
    """Whether a file or directory exists."""
    return _gfile().exists(path) if is_remote(path) else os.path.exists(path)


def is_directory(path: PathLike) -> bool:
    """Whether a path is an existing directory."""
    return _gfile().isdir(path) if is_remote(path) else os.path.isdir(path)


def make_directory(path: PathLike) -> None:
    """Creates a directory and its parents, if missing."""
    if is_remote(path):
        _gfile().makedirs(path)
    else:
        os.makedirs(path, exist_ok=True)


def remove_file(path: PathLike) -> None:
    """Removes a file, if it exists."""
    if not is_remote(path):
        Path(path).unlink(missing_ok=True)
    elif _gfile().exists(path):
        _gfile().remove(path)


def remove_directory(path: PathLike) -> None:
    """Removes a directory and its contents, if it exists."""
    if not is_remote(path):
        shutil.rmtree(path, ignore_errors=True)
    elif _gfile().exists(path):
        _gfile().rmtree(path)


def list_directory(path: PathLike) -> list[str]:
    """Returns the sorted names in a directory."""
    names = _gfile().listdir(path) if is_remote(path) else os.listdir(path)
    return sorted(name.rstrip("/") for name in names)


def glob(pattern: PathLike) -> list[str]:
    """Returns the sorted paths that match a pattern.

    `**` matches directories of any depth; remote file systems do not support it.
    """
    if is_remote(pattern):
        return sorted(_gfile().glob(pattern))
    return sorted(local_glob.glob(str(pattern), recursive=True))


def list_files(directory: PathLike) -> list[str]:
    """Returns the sorted paths of all files below a directory, without hidden ones.

    Example:
        >>> make_directory("data/web")
        >>> write_bytes("data/web/part.jsonl", b"")
        >>> list_files("data")
        ['data/web/part.jsonl']
    """
    walker = _gfile().walk if is_remote(directory) else os.walk
    paths = []
    for parent, directories, names in walker(str(directory)):
        directories[:] = [name for name in directories if name[0] != "."]
        paths += [join(parent, name) for name in names if name[0] != "."]
    return sorted(paths)


def size_and_mtime(path: PathLike) -> tuple[int, int]:
    """Returns the size of a file in bytes and its modification time in nanoseconds.

    Raises:
        OSError: If the file does not exist.
    """
    if is_remote(path):
        with _as_os_error(path):
            stat = _gfile().stat(path)
        return stat.length, stat.mtime_nsec
    stat = os.stat(path)
    return stat.st_size, stat.st_mtime_ns


def copy_file(source: PathLike, target: PathLike) -> None:
    """Copies a file, by a hard link if both paths are on one local file system."""
    if is_remote(source) or is_remote(target):
        with _as_os_error(target):
            _gfile().copy(source, target, overwrite=True)
        return
    try:
        os.link(source, target)
    except OSError:  # Another file system, or no support for links.
        shutil.copyfile(source, target)


def sha256(path: PathLike) -> str:
    """Returns the SHA-256 digest of a file in hexadecimal.

    Example:
        >>> write_bytes("empty", b"")
        >>> sha256("empty")[:8]
        'e3b0c442'
    """
    with open_binary(path) as file:
        if not is_remote(path):
            return hashlib.file_digest(file, "sha256").hexdigest()
        digest = hashlib.sha256()
        while data := file.read(1 << 24):
            digest.update(data)
        return digest.hexdigest()
