"""The tensors of a checkpoint, whichever files they are in."""

import json

from keras_openllama.checkpoints.files import safetensors, torch_zip

# Preferred first: safetensors, where a repository has both. Only one is fetched.
_FORMATS = (
    ("model.safetensors", "model.safetensors.index.json", safetensors.read),
    ("pytorch_model.bin", "pytorch_model.bin.index.json", torch_zip.read),
)


def open_checkpoint(repository):
    """Describes all tensors of a checkpoint; none is read yet.

    Args:
        repository: `repository.Repository`.

    Returns:
        Dict of `StoredTensor` by name, in the order of the files.

    Raises:
        OSError: if there are no weights, or a file of them is missing or cannot be
            fetched.
        ValueError: if a file is damaged, or the index does not agree with the files.
    """
    for single, index, read in _FORMATS:
        if path := repository.optional(index):
            return _open_shards(repository, path, read)
        if path := repository.optional(single):
            return read(path)
    # Neither is there, so that asking for one says what is wrong.
    try:
        path = repository.file(_FORMATS[1][1])
    except FileNotFoundError as error:
        names = [name for single, index, _ in _FORMATS for name in (single, index)]
        raise FileNotFoundError(
            f"No weights found, which are in one of {', '.join(names)}: {error}"
        ) from error
    return _open_shards(repository, path, torch_zip.read)


def _open_shards(repository, index, read):
    files_of = _weight_map(index)
    tensors = {}
    for name in sorted(set(files_of.values())):
        try:
            path = repository.file(name)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{index} names the file {name}: {error}") from None
        for tensor, stored in read(path).items():
            if tensor in tensors:
                other = tensors[tensor].file.path
                raise ValueError(f"{tensor} is in two files, {other} and {path}.")
            tensors[tensor] = stored
    missing = sorted(set(files_of) - set(tensors))
    if missing:
        raise ValueError(
            f"{index} names tensors that its files do not have: {', '.join(missing)}. "
            "Index and files are of different checkpoints, or a file is damaged."
        )
    return tensors


def _weight_map(index):
    files_of = read_weight_map(index)
    check_file_names(index, files_of.values())
    return files_of


def read_weight_map(index):
    """The dict that an index, a path, has under `"weight_map"`.

    Raises:
        ValueError: if the file has no such dict.
    """
    try:
        files_of = json.loads(index.read_bytes())["weight_map"]
        files_of.values()
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{index} cannot be read as the index of a sharded checkpoint "
            f"({type(error).__name__}: {error}). Delete {index.resolve()} and get it "
            "again."
        ) from error
    return files_of


def check_file_names(index, names):
    """Raises a `ValueError` if an index names files that are not beside it."""
    for name in names:
        # A name such as ../../other would reach beyond the checkpoint.
        if (
            not isinstance(name, str)
            or "/" in name
            or "\\" in name
            or name in (".", "")
        ):
            raise ValueError(f"{index} names a file outside its directory: {name!r}.")
