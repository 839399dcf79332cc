"""Files on this machine, or wherever TensorFlow's file systems reach (`gs://…`).

TensorFlow is imported for paths with a scheme only: it takes seconds, in each worker.
"""

import contextlib
import functools
import glob as local_glob
import hashlib
import io
import json
import os
import shutil
import tempfile
from pathlib import Path

from keras_openllama.utils.locks import IS_POSIX


def is_remote(path):
    """Whether a path has a scheme, such as `gs://bucket/file`."""
    return "://" in str(path)


@functools.cache
def _gfile():
    import tensorflow

    return tensorflow.io.gfile


def join(directory, *names):
    """A path below a directory, as a string."""
    return "/".join([str(directory).rstrip("/"), *names])


def open_binary(path):
    """Opens a file for reading bytes; raises `OSError` if it cannot."""
    if not is_remote(path):
        return open(path, "rb")
    with _as_os_error(path):
        _gfile().stat(path)  # GFile itself opens late, at the first read.
    return io.BufferedReader(_Remote(path), 1 << 20)


class _Remote(io.RawIOBase):
    """A file of `tf.io.gfile` that behaves as Python's do."""

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


def read_bytes(path):
    """All bytes of a file."""
    with open_binary(path) as file:
        return file.read()


def write_bytes(path, data):
    """Writes a file that appears whole or not at all."""
    with atomic_write(path) as unfinished:
        Path(unfinished).write_bytes(data)


@contextlib.contextmanager
def atomic_write(path):
    """Yields a local path to write to; what is there in the end appears at `path`.

    Args:
        path: string, local or remote.
    """
    if is_remote(path):
        with tempfile.TemporaryDirectory() as directory:
            unfinished = os.path.join(directory, "file")
            yield unfinished
            with _as_os_error(path):
                _gfile().copy(unfinished, path, overwrite=True)
        return
    # Hidden, and of this process alone: one that was killed may have left its own.
    unfinished = join(os.path.dirname(path) or ".", f".{os.path.basename(path)}")
    unfinished += f".unfinished-{os.getpid()}"
    try:
        yield unfinished
        sync_to_disk(unfinished)
        os.replace(unfinished, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(unfinished)


def sync_to_disk(path):
    """Returns once a file or directory of this machine is on the disk."""
    if not IS_POSIX and os.path.isdir(path):
        return
    descriptor = os.open(path, os.O_RDONLY if IS_POSIX else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_json_object(path):
    """Reads a JSON file of this machine that holds an object.

    Args:
        path: `pathlib.Path`.

    Returns:
        Dict.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if it is not valid JSON, or not an object.
    """
    try:
        data = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path} must hold a JSON object.")
    return data


def exists(path):
    """Whether there is a file or directory."""
    return _gfile().exists(path) if is_remote(path) else os.path.exists(path)


def is_directory(path):
    """Whether it is a directory."""
    return _gfile().isdir(path) if is_remote(path) else os.path.isdir(path)


def make_directory(path):
    """Makes a directory and those above it."""
    if is_remote(path):
        _gfile().makedirs(path)
    else:
        os.makedirs(path, exist_ok=True)


def remove_file(path):
    """Removes a file, if it exists."""
    if not is_remote(path):
        Path(path).unlink(missing_ok=True)
    elif _gfile().exists(path):
        _gfile().remove(path)


def remove_directory(path):
    """Removes a directory and what is in it, if it exists."""
    if not is_remote(path):
        shutil.rmtree(path, ignore_errors=True)
    elif _gfile().exists(path):
        _gfile().rmtree(path)


def list_directory(path):
    """Names in a directory, in order."""
    names = _gfile().listdir(path) if is_remote(path) else os.listdir(path)
    return sorted(name.rstrip("/") for name in names)


def glob(pattern):
    """Paths that match a pattern, in order. `**` stands for directories of any depth.

    Where TensorFlow's file systems look, `**` is not known.
    """
    if is_remote(pattern):
        return sorted(_gfile().glob(pattern))
    return sorted(local_glob.glob(str(pattern), recursive=True))


def list_files(directory):
    """Paths of all files below a directory, hidden ones left out, in order."""
    walker = _gfile().walk if is_remote(directory) else os.walk
    paths = []
    for parent, directories, names in walker(str(directory)):
        directories[:] = [name for name in directories if name[0] != "."]
        paths += [join(parent, name) for name in names if name[0] != "."]
    return sorted(paths)


def size_and_mtime(path):
    """Bytes of a file, and when it was changed, in nanoseconds."""
    if is_remote(path):
        with _as_os_error(path):
            stat = _gfile().stat(path)
        return stat.length, stat.mtime_nsec
    stat = os.stat(path)
    return stat.st_size, stat.st_mtime_ns


def copy_file(source, target):
    """Copies a file; on one machine both names share its bytes where they can."""
    if is_remote(source) or is_remote(target):
        with _as_os_error(target):
            _gfile().copy(source, target, overwrite=True)
        return
    try:
        os.link(source, target)
    except OSError:  # Another file system, or one without links.
        shutil.copyfile(source, target)


def sha256(path):
    """SHA-256 of a file, in hexadecimal."""
    with open_binary(path) as file:
        if not is_remote(path):
            return hashlib.file_digest(file, "sha256").hexdigest()
        digest = hashlib.sha256()
        while data := file.read(1 << 24):
            digest.update(data)
        return digest.hexdigest()
