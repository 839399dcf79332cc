"""Opens checkpoints of one or more files, in safetensors or PyTorch format."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from keras_openllama.checkpoints.files import safetensors, torch_zip
from keras_openllama.checkpoints.matching import format_names
from keras_openllama.utils.files import read_json_object
from keras_openllama.utils.types import PathLike

if TYPE_CHECKING:
    from keras_openllama.checkpoints.repository import Repository
    from keras_openllama.checkpoints.tensors import StoredTensor

# In order of preference: if a repository has both, only safetensors is downloaded.
_FORMATS = (
    ("model.safetensors", "model.safetensors.index.json", safetensors.read_safetensors),
    ("pytorch_model.bin", "pytorch_model.bin.index.json", torch_zip.read_torch_file),
)
# Weights under other names, for the error message.
_OTHER_WEIGHTS = ("*.safetensors", "*.bin", "*.pth", "*.pt", "*.gguf", "*.distcp")


def open_checkpoint(repository: Repository) -> dict[str, StoredTensor]:
    """Opens a checkpoint and lists its tensors, without reading their values.

    Args:
        repository: The repository that holds the checkpoint.

    Returns:
        The tensors by name, in the order of the files.

    Raises:
        OSError: If there are no weights, or a file is missing or cannot be downloaded.
        ValueError: If a file is damaged, or the index does not match the files.
    """
    incomplete = []  # Indexes that name missing files.
    for single, index, read in _FORMATS:
        whole, index_path = repository.optional(single), repository.optional(index)
        if whole:
            stale = [*incomplete, *([(index_path, read)] if index_path else [])]
            _warn_of_ignored(stale, whole)
            return read(whole)
        if not index_path:
            continue
        if {*_weight_map(index_path).values()} <= {*repository.glob("*")}:
            _warn_of_ignored(incomplete, index_path)
            return _open_shards(repository, index_path, read)
        incomplete.append((index_path, read))
    if incomplete:
        # Requesting the missing files raises an error that names them and says why.
        return _open_shards(repository, *incomplete[0])
    raise _no_weights(repository)


def _warn_of_ignored(indexes, used):
    """Warns of indexes that are stale: beside whole weights, or of missing files."""
    for index, _ in indexes:
        warnings.warn(
            f"{index} is ignored, because {used} has all weights. Delete the index, "
            "and the files that it names, if they are not needed.",
            stacklevel=2,
        )


def _no_weights(repository):
    """Returns the error for a repository without weights."""
    names = [name for single, index, _ in _FORMATS for name in (single, index)]
    try:
        repository.file(_FORMATS[1][1])  # Raises an error that says why it is missing.
        reason = ""
    except FileNotFoundError as error:
        reason = f": {error}"
    found = [name for kind in _OTHER_WEIGHTS for name in repository.glob(kind)]
    others = f" It has {format_names(found)}, which are not read." if found else ""
    return FileNotFoundError(
        f"No weights were found in any of {', '.join(names)}{reason}{others}"
    )


def _open_shards(repository, index, read):
    files_of = _weight_map(index)
    tensors = {}
    for name in sorted(set(files_of.values())):
        try:
            path = repository.file(name)
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"{index} names the file {name}: {error} Download or save the weights "
                "again; if they are in another file, delete the index."
            ) from None
        for tensor, stored in read(path).items():
            if tensor in tensors:
                other = tensors[tensor].file.path
                raise ValueError(f"{tensor} is in two files, {other} and {path}.")
            tensors[tensor] = stored
    missing = sorted(set(files_of) - set(tensors))
    if missing:
        raise ValueError(
            f"{index} names tensors that its files do not contain: "
            f"{format_names(missing)}. The index belongs to another checkpoint, or a "
            "file is damaged. Download or save all of them again."
        )
    return tensors


def _weight_map(index):
    files_of = read_weight_map(index)
    check_file_names(index, files_of.values())
    return files_of


def read_weight_map(index: Path) -> dict[str, Any]:
    """Reads the index of a sharded checkpoint.

    Args:
        index: Path of the index, such as `model.safetensors.index.json`.

    Returns:
        The contents of `"weight_map"`: file names by tensor name.

    Raises:
        ValueError: If the file is damaged or has no weight map.
    """
    try:
        files_of = read_json_object(index)["weight_map"]
        files_of.values()
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{index} cannot be read as the index of a sharded checkpoint "
            f"({type(error).__name__}: {error}). Delete {index.resolve()} and download "
            "it again."
        ) from error
    return files_of


def check_file_names(index: PathLike, names: Iterable[Any]) -> None:
    """Checks that an index names only files of its own directory.

    Args:
        index: Path of the index, for the error message.
        names: The names that it contains.

    Raises:
        ValueError: If a name is not a plain file name.

    Example:
        >>> check_file_names("index.json", ["../x.safetensors"])
        Traceback (most recent call last):
        ValueError: index.json names a file outside its directory: '../x.safetensors'.
    """
    for name in names:
        # A name such as ../../other would escape the directory of the checkpoint.
        if (
            not isinstance(name, str)
            or "/" in name
            or "\\" in name
            or name in (".", "")
        ):
            raise ValueError(f"{index} names a file outside its directory: {name!r}.")
