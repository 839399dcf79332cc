"""Directories in KerasHub's format, read and written tensor by tensor.

Keras keeps weights in HDF5 files under names that follow from a walk through the
model's layers. Here that walk is Keras's own, through a model without weights, so that
the names are right by construction; and the tensors lie in the files in one piece each,
so that they are mapped and written like those of any other format.
"""

import io
import json
import tempfile
from pathlib import Path

import h5py

from keras_openllama.backend import keras_private
from keras_openllama.checkpoints import array_io, weight_names
from keras_openllama.checkpoints.matching import match
from keras_openllama.checkpoints.outputs import Output, small_file
from keras_openllama.checkpoints.shards import check_file_names, read_weight_map
from keras_openllama.checkpoints.tensors import (
    MappedFile,
    MappedTensor,
    contiguous_strides,
    numpy_dtype,
)

REGISTERED_NAME = "keras_openllama>OpenLlamaBackbone"  # Keras's, of the backbone.
TOKENIZER = "assets/tokenizer/vocabulary.spm"
# KerasHub's files: the weights of the backbone, in one file or (their index) in
# several, and those that the task adds.
_BACKBONE, _BACKBONE_INDEX = "model.weights.h5", "model.weights.json"
_TASK = "task.weights.h5"


def backbone_arguments(config, path="config.json"):
    """Arguments of `OpenLlamaBackbone` for a `config.json` of KerasHub's format.

    Args:
        config: dict, the file's contents.
        path: where it is from, for messages.

    Raises:
        ValueError: if it is another model's.
    """
    found = config.get("registered_name")
    if found != REGISTERED_NAME:
        raise ValueError(f"{path} is of a {found!r}, not of {REGISTERED_NAME!r}.")
    settings = config.get("config")
    if not isinstance(settings, dict):
        raise ValueError(f"{path} has no 'config' with the model's settings.")
    if "quantiz" in json.dumps(settings.get("dtype")).lower():
        raise ValueError(
            f"{path} is of a quantised model, and only floating-point ones can be "
            "converted."
        )
    own = ("name", "trainable", "dtype")  # Of the Keras model, not of the network.
    return {name: value for name, value in settings.items() if name not in own}


# ----- Names


class _Names(keras_private.H5IOStore):
    """Takes the place of Keras's file, and notes where each variable would go."""

    def __init__(self):
        self.variables = {}  # By name in the file.
        self.groups = {}  # Attributes by name of the group of variables.
        self._group = None

    def __bool__(self):
        return True

    def make(self, path, metadata=None):
        self._group = f"{path}/vars" if path else "vars"
        self.groups[self._group] = metadata or {}
        return self

    def __setitem__(self, key, variable):
        self.variables[f"{self._group}/{key}"] = variable


def _names(saved, skipped=()):
    """Where Keras would put the variables of a model, see `_Names`."""
    names = _Names()
    keras_private.save_state(saved, names, skipped)
    return names


def _backbone_names(task):
    return _names(task.backbone)


def _task_names(task):
    return _names(task, keras_private.flatten_layers(task.backbone))


# ----- Reading


def read_tensors(repository, arguments, build_task, head=True):
    """Describes the tensors of a directory; none is read yet.

    Args:
        repository: `repository.Repository`.
        arguments: dict, arguments of `OpenLlamaBackbone`.
        build_task: function `(arguments, dtype)` that returns an `OpenLlamaCausalLM`
            whose variables have no values.
        head: bool, whether the language-model head is wanted.

    Returns:
        Dict of `tensors.StoredTensor`s by variable path.

    Raises:
        OSError: if a file is missing or cannot be read.
        ValueError: if a file is damaged, or its tensors are not those of the network
            that the arguments describe.
    """
    task = build_task(arguments, "float32")
    found, expected = {}, {}
    parts = [(_backbone_files(repository), _backbone_names(task))]
    if head:
        parts.append(([_task_file(repository)], _task_names(task)))
    for paths, names in parts:
        for path in paths:
            found.update(_read_file(path))
        for name, variable in names.variables.items():
            expected[variable.path] = (name, tuple(variable.shape))
    # What an optimizer kept there is of no use.
    found = {name: t for name, t in found.items() if not name.startswith("optimizer/")}
    matched = match(found, expected, repository)
    rows = weight_names.weights(arguments["num_layers"], head)
    return {row.path: matched[row.path] for row in rows}


def _task_file(repository):
    try:
        return repository.file(_TASK)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{error} A backbone that was saved alone has no language-model head: save "
            "the OpenLlamaCausalLM."
        ) from error


def _backbone_files(repository):
    index = repository.optional(_BACKBONE_INDEX)
    if index is None:
        return [repository.file(_BACKBONE)]
    names = []
    for entry in read_weight_map(index).values():
        names += entry if isinstance(entry, list) else [entry]
    check_file_names(index, names)
    return [repository.file(name) for name in sorted(set(names))]


def _read_file(path):
    """The tensors of one HDF5 file, by name."""
    mapped = MappedFile(path)
    tensors = {}

    def visit(name, item):
        if not isinstance(item, h5py.Dataset):
            return
        if not item.dtype.isnative:
            raise ValueError(f"{name} is in the byte order of another machine")
        dtype = item.dtype.name
        if item.attrs.get("dtype") == "bfloat16" and item.dtype.itemsize == 2:
            dtype = "bfloat16"
        offset = item.id.get_offset()
        if offset is None and item.size:
            raise ValueError(f"{name} is not in one piece, as Keras writes it")
        if offset is not None and offset + item.nbytes > mapped.size:
            raise ValueError(f"{name} reaches beyond the end of the file")
        strides = contiguous_strides(item.shape)
        tensors[name] = MappedTensor(
            name, dtype, item.shape, strides, offset or 0, mapped
        )

    try:
        with h5py.File(path, "r") as file:
            file.visititems(visit)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise ValueError(
            f"{path} ({mapped.size:,} bytes) cannot be read as weights of Keras: "
            f"{error}. {mapped.remedy}"
        ) from error
    return tensors


# ----- Writing


def plan(contents, dtype, build_task):
    """The files of a directory.

    Args:
        contents: `contents.Contents`.
        dtype: string, of the weights to write.
        build_task: function `(arguments, dtype, tokenizer, preprocessing)` that returns
            an `OpenLlamaCausalLM` whose variables have no values; the last two are
            those of `contents`.

    Returns:
        List of `outputs.Output`.
    """
    task = build_task(
        contents.arguments, dtype, contents.tokenizer, contents.preprocessing
    )
    weights = {_BACKBONE: _backbone_names(task), _TASK: _task_names(task)}
    return [
        *(small_file(name, data) for name, data in _small_files(task).items()),
        *(_weights(name, names, dtype) for name, names in weights.items()),
    ]


def _small_files(task):
    """Configurations and tokenizer: bytes by name."""
    from keras_openllama.backend.keras_hub import save_configurations

    with tempfile.TemporaryDirectory() as directory:
        save_configurations(task, directory)
        paths = [path for path in Path(directory).rglob("*") if path.is_file()]
        return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(paths)}


def _weights(name, names, dtype):
    frame = _Frame(names, dtype)
    return Output(
        name,
        frame.size,
        frame.write,
        tuple(variable.path for variable in names.variables.values()),
    )


class _Frame:
    """A file of weights without the weights: what HDF5 writes around them.

    HDF5 makes the frame in memory, and the weights are written to their places as to
    any file. HDF5 itself, where a disk is full, can neither finish nor close a file.

    Args:
        names: `_Names`, what the file holds.
        dtype: string, of the weights.
    """

    def __init__(self, names, dtype):
        self._dtype = dtype
        self._recording = _Recording()
        with h5py.File(self._recording, "w") as file:
            for group, attributes in names.groups.items():
                file.create_group(group).attrs.update(attributes)
            datasets = [
                self._dataset(file, name, variable)
                for name, variable in names.variables.items()
            ]
            self._places = [(d.id.get_offset(), d.shape) for d in datasets]
        self.size = self._recording.size

    def _dataset(self, file, name, variable):
        place = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        place.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
        place.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
        dataset = file.create_dataset(
            name, variable.shape, numpy_dtype(self._dtype), dcpl=place
        )
        if self._dtype == "bfloat16":  # HDF5 has no name for it.
            dataset.attrs["dtype"] = "bfloat16"
        return dataset

    def write(self, file, values):
        """Writes the file; `values` are NumPy arrays in the order of the names."""
        file.truncate(self.size)
        for start, data in self._recording.writes:
            file.seek(start)
            file.write(data)
        for (offset, shape), value in zip(self._places, values, strict=True):
            file.seek(offset)
            array_io.write(file, value, shape, self._dtype)


class _Recording(io.RawIOBase):
    """A file that remembers what is written, however large the gaps between."""

    def __init__(self):
        self.writes = []  # Start and bytes of each.
        self.size = 0
        self._position = 0

    def seek(self, offset, whence=io.SEEK_SET):
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.size}
        self._position = start[whence] + offset
        return self._position

    def tell(self):
        return self._position

    def write(self, data):
        self.writes.append((self._position, bytes(data)))
        self._position += len(data)
        self.size = max(self.size, self._position)
        return len(data)

    def readinto(self, buffer):
        """HDF5 reads back what it has written; gaps are zeros."""
        begin, count = self._position, len(buffer)
        view = memoryview(buffer)
        view[:] = bytes(count)
        for start, data in self.writes:
            first, last = max(start, begin), min(start + len(data), begin + count)
            if first < last:
                view[first - begin : last - begin] = data[first - start : last - start]
        self._position += count
        return count

    def truncate(self, size=None):
        self.size = self._position if size is None else size
        return self.size
