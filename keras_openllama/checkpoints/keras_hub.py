"""Reads and writes directories in KerasHub's format, tensor by tensor.

Keras saves weights in HDF5 files. It derives the name of each dataset from a traversal
of the model's layers. This module obtains the names from Keras's own traversal of a
model without weights, so they are correct by construction. Each tensor is a contiguous
range of the file, so it is memory-mapped and written like those of the other formats.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import h5py
import numpy as np

from keras_openllama.backend import keras_private
from keras_openllama.checkpoints import array_io, weight_names
from keras_openllama.checkpoints.hdf5_file import RecordingFile
from keras_openllama.checkpoints.matching import match_tensors
from keras_openllama.checkpoints.outputs import OutputFile, small_file
from keras_openllama.checkpoints.quantized_tensors import (
    MatrixTensor,
    arrays_in_format,
    value_as_it_is,
)
from keras_openllama.checkpoints.shards import check_file_names, read_weight_map
from keras_openllama.checkpoints.tensors import (
    MappedFile,
    MappedTensor,
    contiguous_strides,
    numpy_dtype,
)
from keras_openllama.layers.quantizable import is_quantized
from keras_openllama.quantization.policies import matrix_format, policy_of

if TYPE_CHECKING:
    import keras

    from keras_openllama.checkpoints.contents import ModelContents
    from keras_openllama.checkpoints.repository import Repository
    from keras_openllama.checkpoints.tensors import StoredTensor
    from keras_openllama.quantization.policies import MatrixFormat
    from keras_openllama.quantization.quantized_matrix import QuantizedMatrix
    from keras_openllama.utils.types import PathLike

REGISTERED_NAME = "keras_openllama>OpenLlamaBackbone"  # Of Keras's serialization.
TOKENIZER = "assets/tokenizer/vocabulary.spm"
# KerasHub's files: the weights of the backbone, in one file or in several that an index
# lists, and the weights that the task adds.
_BACKBONE, _BACKBONE_INDEX = "model.weights.h5", "model.weights.json"
_TASK = "task.weights.h5"


def backbone_arguments(
    config: dict[str, Any], path: PathLike = "config.json"
) -> dict[str, Any]:
    """Converts a `config.json` of KerasHub's format to arguments of the backbone.

    Args:
        config: Contents of the file.
        path: Its path, for error messages.

    Returns:
        Keyword arguments of `OpenLlamaBackbone`.

    Raises:
        ValueError: If the file belongs to another model.
    """
    found = config.get("registered_name")
    if found != REGISTERED_NAME:
        raise ValueError(f"{path} is of a {found!r}, not of {REGISTERED_NAME!r}.")
    settings = config.get("config")
    if not isinstance(settings, dict):
        raise ValueError(f"{path} has no 'config' with the model's settings.")
    of_keras = ("name", "trainable", "dtype")  # Of `keras.Model`, not of the backbone.
    return {name: value for name, value in settings.items() if name not in of_keras}


# ----- Names


class NameRecorder(keras_private.H5IOStore):
    """Stands in for Keras's HDF5 file, and records the name of each variable.

    Attributes:
        variables: The variables by name in the file.
        groups: Attributes by name of the group of variables.
    """

    def __init__(self):
        self.variables = {}
        self.groups = {}
        self._group = None

    def __bool__(self):
        return True

    def make(self, path: str, metadata: dict[str, Any] | None = None) -> NameRecorder:
        """Starts a group of variables, as `H5IOStore.make`."""
        self._group = f"{path}/vars" if path else "vars"
        self.groups[self._group] = metadata or {}
        return self

    def __setitem__(self, key, variable):
        self.variables[f"{self._group}/{key}"] = variable


def saved_names(
    model: keras.Model, skipped: Iterable[keras.layers.Layer] = ()
) -> NameRecorder:
    """Returns the names under which Keras would save the variables of a model.

    Args:
        model: The model.
        skipped: Layers to skip.

    Returns:
        The names of variables and of their groups.

    Example:
        >>> "layers/rms_norm/vars/0" in saved_names(lm.backbone).variables
        True
    """
    names = NameRecorder()
    keras_private.save_state(model, names, skipped)
    return names


def _backbone_names(task):
    return saved_names(task.backbone)


def _task_names(task):
    return saved_names(task, keras_private.flatten_layers(task.backbone))


# ----- Reading


def read_tensors(
    repository: Repository,
    arguments: dict[str, Any],
    build_empty_task: Callable[..., keras.Model],
    head: bool = True,
    policy: str | keras.DTypePolicy = "float32",
) -> dict[str, StoredTensor]:
    """Opens a directory and lists its tensors, without reading their values.

    Args:
        repository: The directory.
        arguments: Arguments of `OpenLlamaBackbone`.
        build_empty_task: Function `(arguments, dtype)` that returns an
            `OpenLlamaCausalLM` whose variables have no values.
        head: Whether to include the language-model head.
        policy: Dtype policy of the saved model, if it is quantized.

    Returns:
        The tensors by variable path.

    Raises:
        OSError: If a file is missing or cannot be read.
        ValueError: If a file is damaged, or its tensors do not match the arguments.
    """
    task = build_empty_task(arguments, policy)
    found, expected = {}, {}
    parts = [(_backbone_files(repository), _backbone_names(task))]
    if head:
        parts.append(([task_file(repository)], _task_names(task)))
    for paths, names in parts:
        for path in paths:
            found.update(_read_file(path))
        for name, variable in names.variables.items():
            expected[variable.path] = (name, tuple(variable.shape))
    # The state of an optimizer is not loaded.
    found = {name: t for name, t in found.items() if not name.startswith("optimizer/")}
    layers = keras_private.flatten_layers(task if head else task.backbone)
    quantized = [layer for layer in layers if is_quantized(layer)]
    matrices = [_matrix(layer, found, expected, repository) for layer in quantized]
    matched = match_tensors(found, expected, repository)
    matched.update(matrices)
    rows = weight_names.weight_specs(arguments["num_layers"], head)
    return {row.path: matched[row.path] for row in rows}


def _matrix(layer, found, expected, repository):
    """Takes the arrays of a quantized layer; returns its variable path and tensor."""
    variables = layer.quantized_variables()
    names = [expected.pop(variable.path)[0] for variable in variables]
    parts = [found.pop(name, None) for name in names]
    for variable, part in zip(variables, parts, strict=True):
        stored = part and (tuple(part.shape), part.dtype)
        if stored != (tuple(variable.shape), variable.dtype):
            raise ValueError(
                f"{repository} has {stored} for {variable.path}, expected "
                f"{tuple(variable.shape)} and {variable.dtype}. If version 0.2 "
                "quantized the model, load it with `from_preset`, save it with "
                "`save_to_preset`, and use the new directory."
            )
    chosen = matrix_format(policy_of(layer))
    dtype = layer.variable_dtype
    return variables[0].path, MatrixTensor(parts, layer.matrix_shape, dtype, chosen)


def task_file(repository: Repository) -> Path:
    """Returns the path of the weights of the head.

    Raises:
        FileNotFoundError: If the directory is that of a backbone.
    """
    try:
        return repository.file(_TASK)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{error} An OpenLlamaBackbone is saved without the language-model head: "
            "save the OpenLlamaCausalLM."
        ) from error


def _backbone_files(repository):
    index = repository.optional(_BACKBONE_INDEX)
    # As in KerasHub, an index beside the whole weights is ignored: it is stale.
    if index is None or repository.optional(_BACKBONE):
        return [repository.file(_BACKBONE)]
    names = []
    for entry in read_weight_map(index).values():
        names += entry if isinstance(entry, list) else [entry]
    check_file_names(index, names)
    return [repository.file(name) for name in sorted(set(names))]


def _read_file(path):
    """Returns the tensors of one HDF5 file by name."""
    mapped = MappedFile(path)
    tensors = {}

    def visit(name, item):
        if not isinstance(item, h5py.Dataset):
            return
        if not item.dtype.isnative:
            raise ValueError(f"{name} does not have the byte order of this machine")
        dtype = item.dtype.name
        if item.attrs.get("dtype") == "bfloat16" and item.dtype.itemsize == 2:
            dtype = "bfloat16"
        offset = item.id.get_offset()
        if offset is None and item.size:
            raise ValueError(f"{name} is not contiguous, as Keras writes it")
        if offset is not None and offset + item.nbytes > mapped.size:
            raise ValueError(f"{name} extends beyond the end of the file")
        strides = contiguous_strides(item.shape)
        tensors[name] = MappedTensor(
            name, dtype, item.shape, strides, offset or 0, mapped
        )

    try:
        with h5py.File(path, "r") as file:
            file.visititems(visit)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise ValueError(
            f"{path} ({mapped.size:,} bytes) cannot be read as Keras weights: "
            f"{error}. {mapped.remedy}"
        ) from error
    return tensors


# ----- Writing


def output_files(
    contents: ModelContents, dtype: str, build_empty_task: Callable[..., keras.Model]
) -> list[OutputFile]:
    """Lists the files of an export in KerasHub's format.

    Args:
        contents: The model.
        dtype: Name of the dtype of the exported weights.
        build_empty_task: Function `(arguments, dtype, tokenizer, preprocessing,
            tokenizer_settings, end_token_ids)` that returns an `OpenLlamaCausalLM`
            whose variables have no values. The last four arguments are attributes of
            `contents`.

    Returns:
        The files of the directory.
    """
    task = build_empty_task(
        contents.arguments,
        dtype,
        contents.tokenizer,
        contents.preprocessing,
        contents.tokenizer_settings,
        contents.end_token_ids,
    )
    layers = keras_private.flatten_layers(task)
    formats = {
        layer.path: matrix_format(policy_of(layer))
        for layer in layers
        if is_quantized(layer)
    }
    weights = {_BACKBONE: _backbone_names(task), _TASK: _task_names(task)}
    layouts = {name: _HDF5Layout(names, formats) for name, names in weights.items()}
    return [
        *(small_file(name, data) for name, data in _small_files(task).items()),
        *(
            OutputFile(
                name, layout.size, layout.write_file, layout.tensors, value_as_it_is
            )
            for name, layout in layouts.items()
        ),
    ]


def _small_files(task):
    """Returns the contents of configuration and tokenizer files by name."""
    from keras_openllama.backend.keras_hub import save_configurations

    with tempfile.TemporaryDirectory() as directory:
        save_configurations(task, directory)
        paths = [path for path in Path(directory).rglob("*") if path.is_file()]
        return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(paths)}


class _HDF5Layout:
    """The metadata of an HDF5 file, and the offsets of its datasets.

    HDF5 creates the metadata in memory. The weights are then written to their offsets
    by ordinary file operations, because HDF5 can neither finish nor close a file when
    the disk is full.

    Args:
        names: Names of the variables. Those of a quantized layer follow each other.
        formats: How each layer that is quantized is, by path.

    Attributes:
        size: Size of the file in bytes.
        tensors: The variable paths of the weights, in the order of the file.
    """

    def __init__(self, names: NameRecorder, formats: Mapping[str, MatrixFormat]):
        self._metadata = RecordingFile()
        with h5py.File(self._metadata, "w") as file:
            for group, attributes in names.groups.items():
                file.create_group(group).attrs.update(attributes)
            # Each layer has one weight; a quantized one has its scales beside it.
            self._weights = {}
            for layer, items in itertools.groupby(names.variables.items(), _layer_of):
                items = list(items)
                ranges = [self._range(file, *item) for item in items]
                self._weights[items[0][1].path] = formats.get(layer), ranges
        self.size = self._metadata.size
        self.tensors = tuple(self._weights)

    def _range(self, file, name, variable):
        """Creates a dataset; returns its offset, shape and dtype."""
        properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        properties.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
        properties.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
        dataset = file.create_dataset(
            name, variable.shape, numpy_dtype(variable.dtype), dcpl=properties
        )
        if variable.dtype == "bfloat16":  # HDF5 has no such type.
            dataset.attrs["dtype"] = "bfloat16"
        return dataset.id.get_offset(), dataset.shape, variable.dtype

    def write_file(
        self, file: BinaryIO, values: Iterable[np.ndarray | QuantizedMatrix]
    ) -> None:
        """Writes the file; `values` are in the order of `tensors`."""
        file.truncate(self.size)
        for start, data in self._metadata.writes:
            file.seek(start)
            file.write(data)
        for (chosen, ranges), value in zip(self._weights.values(), values, strict=True):
            arrays = arrays_in_format(value, chosen)
            for (offset, shape, dtype), array in zip(ranges, arrays, strict=True):
                file.seek(offset)
                array_io.write_array(file, array, shape, dtype)


def _layer_of(item):
    """Returns the path of the layer of a variable, an item of `NameRecorder`."""
    return item[1].path.rpartition("/")[0]
