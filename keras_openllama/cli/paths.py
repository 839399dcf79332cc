"""Checks of paths and presets, before a command does anything that takes time."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path

from keras_openllama import presets
from keras_openllama.cli.messages import describe_error
from keras_openllama.utils.file_types import GGUF_SUFFIX, is_gguf_file
from keras_openllama.utils.files import is_remote


def require_file(flag: str, path: str) -> None:
    """Raises an error unless a file exists and can be read.

    Args:
        flag: The flag, for the error message.
        path: Path of the file.

    Raises:
        ValueError: If it does not exist, is a directory, or may not be read.

    Example:
        >>> require_file("--data", ".")
        Traceback (most recent call last):
        ...
        ValueError: --data: . is a directory. Name a file.
    """
    if os.path.isdir(path):
        files = sorted(
            child
            for child in Path(path).iterdir()
            if child.suffix in (".json", ".jsonl") and child.is_file()
        )
        names = "Name a file."
        if files:
            names = f"Name its files, such as {files[0]} or {path}/*{files[0].suffix}."
        raise ValueError(f"{flag}: {path} is a directory. {names}")
    if not os.path.exists(path):
        raise ValueError(f"{flag}: the file {path} does not exist.")
    _require_access(flag, path, os.R_OK, "read")


def require_directory(flag: str, path: str) -> None:
    """Raises an error unless a directory exists and can be read.

    Args:
        flag: The flag, for the error message.
        path: Path of the directory. A remote path is not checked.

    Raises:
        ValueError: If it does not exist, is a file, or may not be read.

    Example:
        >>> require_directory("--data", "missing")
        Traceback (most recent call last):
        ...
        ValueError: --data: the directory missing does not exist.
    """
    if is_remote(path):
        return
    if not os.path.exists(path):
        raise ValueError(f"{flag}: the directory {path} does not exist.")
    if not os.path.isdir(path):
        raise ValueError(f"{flag}: {path} is a file, and must be a directory.")
    _require_access(flag, path, os.R_OK | os.X_OK, "read")


def require_preset(
    flag: str, name: str, revision: str | None = None, tokenizer: bool = False
) -> None:
    """Raises an error if a model is no preset, directory or file, nor on the Hub.

    Args:
        flag: The flag, for the error message.
        name: The name, the path of a directory or GGUF file, or `hf://user/repo`.
        revision: `--revision`, which applies to the Hub only.
        tokenizer: Whether only its tokenizer is needed.

    Raises:
        ValueError: If there is no such preset, directory or GGUF file, or it is not
            that of a model.

    Example:
        >>> require_preset("--preset", "nano")
    """
    if name.startswith("hf://") or _is_on_hub(presets.find(name)):
        return
    preset = presets.find(name)
    if preset and revision is None:
        return
    if preset or (name and (os.path.isdir(name) or is_gguf_file(name))):
        from keras_openllama.loading.model_directory import check_model

        with _errors_name(flag):
            check_model(preset.name if preset else name, revision, tokenizer)
        return
    if name.endswith(GGUF_SUFFIX):
        require_file(flag, name)
    raise presets.unknown_preset_error(name, _argument_of(flag))


def require_adapters(flag: str, path: str | None) -> None:
    """Raises an error unless LoRA adapters are a directory, or on the Hub.

    Args:
        flag: The flag, for the error message.
        path: Path of the directory, or `hf://user/repo`. `None` stands for no adapters.

    Raises:
        ValueError: If the directory does not exist, has no adapters, or may not be
            read.

    Example:
        >>> require_adapters("--adapters", "hf://user/repo")
    """
    if path and not path.startswith("hf://"):
        require_directory(flag, path)
        from keras_openllama.loading.model_directory import check_adapters

        with _errors_name(flag):
            check_adapters(path)


def require_texts(flag: str, paths: Sequence[str | Path]) -> None:
    """Raises an error unless texts can be read, see `evaluation.texts.read_texts`.

    Args:
        flag: The flag, for the error message.
        paths: Paths of files and directories.

    Raises:
        ValueError: If one does not exist, is empty, or is in another format.

    Example:
        >>> require_texts("--perplexity", ["book.pdf"])
        Traceback (most recent call last):
        ...
        ValueError: --perplexity: book.pdf does not exist. Check the path.
    """
    if paths:
        from keras_openllama.evaluation.texts import check_texts

        with _errors_name(flag):
            check_texts(paths)


def require_output_directory(flag: str, path: str) -> None:
    """Raises an error if a directory can be neither created nor written into.

    Args:
        flag: The flag, for the error message.
        path: Path of the directory. A remote path is not checked.

    Raises:
        ValueError: If a file has this path, or permissions are missing.

    Example:
        >>> require_output_directory("--output", "runs/mine")
    """
    if is_remote(path):
        return
    existing = Path(path)
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        raise ValueError(
            f"{flag}: {existing} is a file. Choose another path for the directory."
        )
    _require_access(flag, existing, os.W_OK | os.X_OK, "write in")


def require_output_file(flag: str, path: str, suffixes: Sequence[str] = ()) -> None:
    """Raises an error if a file cannot be written.

    Args:
        flag: The flag, for the error message.
        path: Path of the file. A remote path is checked by its suffix only.
        suffixes: The suffixes that the file may have. By default, any.

    Raises:
        ValueError: If it is a directory, its directory does not exist, permissions are
            missing, or it has another suffix.

    Example:
        >>> require_output_file("--output", "loss.gif", (".png", ".svg"))
        Traceback (most recent call last):
        ...
        ValueError: --output must end in .png or .svg. Received: 'loss.gif'
    """
    file = Path(path)
    if suffixes and file.suffix.lower() not in suffixes:
        allowed = " or ".join(suffixes)
        raise ValueError(f"{flag} must end in {allowed}. Received: {str(path)!r}")
    if is_remote(path):
        return
    if file.is_dir():
        raise ValueError(f"{flag}: {path} is a directory. Name a file in it.")
    if not file.parent.is_dir():
        raise ValueError(
            f"{flag}: the directory of {path} does not exist. Create it first."
        )
    _require_access(flag, file.parent, os.W_OK | os.X_OK, "write in")


def _is_on_hub(preset):
    return preset and preset.weights["transformers"].startswith("hf://")


@contextlib.contextmanager
def _errors_name(flag):
    """Adds the flag to the message of an error."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise ValueError(f"{flag}: {describe_error(error)}") from error


def _argument_of(flag):
    """The name that `messages.with_flags` replaces by the flag."""
    return flag.removeprefix("--").replace("-", "_").lower()


def _require_access(flag, path, mode, verb):
    if not os.access(path, mode):
        raise ValueError(f"{flag}: you have no permission to {verb} {path}.")
