"""LoRA adapters in the files of Keras (`.weights.h5`, `.keras`) and of KerasHub.

In Keras's files, each projection has its kernel and beside it the adapters and their
alpha, see `layers.projection.Projection.save_own_variables`. KerasHub's `.lora.h5` has
the adapters alone, by the index of the layer; alpha is an addition of this package.
"""

from __future__ import annotations

import io
import os
import warnings
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import h5py

from keras_openllama.backend.arrays import as_numpy
from keras_openllama.backend.keras_private import flatten_layers
from keras_openllama.checkpoints.keras_hub import saved_names
from keras_openllama.checkpoints.matching import format_names
from keras_openllama.checkpoints.shards import check_file_names, read_weight_map
from keras_openllama.config import PROJECTIONS
from keras_openllama.layers.lora import adapted_layers
from keras_openllama.layers.projection import ALPHA, FACTORS, Projection
from keras_openllama.utils.files import write_bytes
from keras_openllama.utils.validation import check_positive

if TYPE_CHECKING:
    import keras

    from keras_openllama.utils.types import PathLike

_LORA_SUFFIX = ".lora.h5"
_IN_KERAS_ARCHIVE = "model.weights.h5"


class _Adapter(NamedTuple):
    """The adapters of one projection."""

    target: str  # Name of the projection, such as "query".
    rank: int
    alpha: float


def _describe(adapters: Iterable[_Adapter]) -> str:
    """Describes adapters by the call of `enable_lora` that gives a model the same."""
    targets = {adapter.target for adapter in adapters}
    ranks = " or ".join(str(r) for r in sorted({a.rank for a in adapters}))
    alphas = " or ".join(f"{a:g}" for a in sorted({a.alpha for a in adapters}))
    names = [name for name in PROJECTIONS if name in targets]
    return f"`enable_lora({ranks}, {names}, alpha={alphas})`"


# ----- Adapters beside the kernels


def check_adapters(model: keras.Model, path: PathLike) -> None:
    """Compares the adapters in a file of weights with those of a model.

    Args:
        model: `OpenLlamaBackbone` or `OpenLlamaCausalLM`.
        path: Path of the file. Remote or missing files, and files of other formats than
            `.weights.h5`, `.weights.json` and `.keras`, are ignored.

    Raises:
        ValueError: If both have adapters of another rank, alpha or layers; or if the
            file has some that would be merged into a quantized kernel.
    """
    if not os.path.isfile(path):
        return  # Keras copies remote files, and reports missing ones.
    stored, own = _adapters_in(path), _adapters_of(model)
    if stored == own:
        return
    if stored and own:
        differ = sorted({name for name, _ in {*stored.items()} ^ {*own.items()}})
        raise ValueError(
            f"{path} has the adapters of {_describe(stored.values())}, but this model "
            f"those of {_describe(own.values())}. They differ in "
            f"{format_names(differ)}. Load the model "
            "again, and make the first call before `load_weights`."
        )
    if not stored:
        warnings.warn(
            f"{path} has no LoRA adapters: those of this model are reset, so that they "
            "change nothing until they are trained. If version 0.1 saved the file "
            "from a model with adapters, they are merged into its kernels.",
            stacklevel=3,
        )
        return
    remedy = f"call {_describe(stored.values())} before `load_weights`"
    modes = {
        la.quantization_mode for la in flatten_layers(model) if la.name in PROJECTIONS
    }
    if modes - {None}:
        raise ValueError(
            f"{path} has LoRA adapters, which this model does not have, and they "
            f"cannot be merged into quantized kernels: {remedy}."
        )
    warnings.warn(
        f"{path} has LoRA adapters, which this model does not have: they are merged "
        f"into its kernels. To keep them apart, {remedy}.",
        stacklevel=3,
    )


def _adapters_of(model):
    """Returns the adapters of a model by the name of the layer in a file."""
    names = saved_names(model)
    targets = {group: found.get("name") for group, found in names.groups.items()}
    ranks = {
        name: variable.shape[0]
        for name, variable in names.variables.items()
        if name.endswith(f"/{FACTORS[1]}")
    }
    return _by_layer(targets, ranks, names.variables)


def _adapters_in(path):
    """Returns the adapters in a file of weights by the name of the layer."""
    targets, ranks, alphas = {}, {}, {}

    def visit(name, item):
        if "name" in item.attrs:
            targets[name] = item.attrs["name"]
        elif name.endswith(f"/{FACTORS[1]}"):
            ranks[name] = item.shape[0]
        elif name.endswith(f"/{ALPHA}"):
            alphas[name] = item[()]

    for file in _weight_files(path):  # Shards may divide the variables of a layer.
        file.visititems(visit)
    return _by_layer(targets, ranks, alphas)


def _by_layer(targets, ranks, alphas):
    return {
        group: _Adapter(target, ranks[f"{group}/{FACTORS[1]}"], float(alpha))
        for group, target in targets.items()
        if (alpha := alphas.get(f"{group}/{ALPHA}")) is not None
    }


def _weight_files(path):
    """Yields the open HDF5 files of a `.weights.h5`, `.weights.json` or `.keras`."""
    name = os.fspath(path)
    if name.endswith(".weights.h5"):
        with h5py.File(path) as file:
            yield file
    elif name.endswith(".weights.json"):
        index = Path(path)
        names = set()
        for entry in read_weight_map(index).values():
            names.update(entry if isinstance(entry, list) else [entry])
        check_file_names(index, names)
        for shard in sorted(names):
            with h5py.File(index.with_name(shard)) as file:
                yield file
    elif name.endswith(".keras"):
        with (
            zipfile.ZipFile(path) as archive,
            archive.open(_IN_KERAS_ARCHIVE) as data,
            h5py.File(data) as file,
        ):
            yield file


# ----- Adapters alone


def save_lora_weights(backbone: keras.Model, path: PathLike) -> None:
    """Implements `OpenLlamaBackbone.save_lora_weights`.

    Args:
        backbone: `OpenLlamaBackbone` with adapters of one rank and alpha.
        path: Path of the file, which KerasHub can read, too.

    Raises:
        ValueError: If there are no adapters, or the file has another extension.
    """
    layers = adapted_layers(backbone)
    if not layers:
        raise ValueError(
            "There are no adapters to save. Add some with `enable_lora`, or restore "
            "merged ones with `unmerge_lora`."
        )
    if not os.fspath(path).endswith(_LORA_SUFFIX):
        raise ValueError(
            f"`filepath` must end in {_LORA_SUFFIX}. Received: filepath={str(path)!r}"
        )
    data = io.BytesIO()  # HDF5 cannot close a file on a full disk.
    with h5py.File(data, "w") as file:
        settings = file.create_group("lora/vars")
        settings["rank"], settings["alpha"] = layers[0].lora_rank, layers[0].lora_alpha
        for index, layer in _layers_by_index(backbone).items():
            if layer in layers:
                factors = file.create_group(f"lora/{index}/vars")
                for name, variable in layer.adapters().items():
                    factors[name] = as_numpy(variable.value)
    write_bytes(path, data.getvalue())


def _layers_by_index(backbone):
    """Returns the layers as KerasHub numbers them: those that have weights."""
    layers = flatten_layers(backbone, include_self=False)
    return dict(enumerate(layer for layer in layers if layer.weights))


def load_lora_weights(backbone: keras.Model, path: PathLike) -> None:
    """Implements `OpenLlamaBackbone.load_lora_weights`.

    Args:
        backbone: `OpenLlamaBackbone`.
        path: Path of the file.

    Raises:
        ValueError: If the file does not belong to the model.
        OSError: If it cannot be read.
    """
    rank, alpha, factors = _read_lora_file(path)
    layers = _layers_by_index(backbone)
    for index, arrays in factors.items():
        _check_shapes(path, index, layers.get(index), arrays, rank)
    own = {
        index: _Adapter(layer.name, layer.lora_rank, float(layer.lora_alpha))
        for index, layer in layers.items()
        if layer in adapted_layers(backbone)
    }
    if alpha is None:
        alpha = _unknown_alpha(path, own, rank)
    stored = {i: _Adapter(layers[i].name, rank, float(alpha)) for i in factors}
    if own and own != stored:
        raise ValueError(
            f"{path} has the adapters of {_describe(stored.values())}, but this model "
            f"those of {_describe(own.values())}. Load the model again, and call "
            "`load_lora_weights` without `enable_lora`, or after the first call."
        )
    if not own:
        _add_adapters(backbone, path, layers, stored)
    for index, arrays in factors.items():
        for name, variable in layers[index].adapters().items():
            variable.assign(arrays[name])


def _read_lora_file(path):
    """Returns rank, alpha or `None`, and the factors by index of the layer."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"`filepath` is not a file. Received: {str(path)!r}")
    try:
        with h5py.File(path) as file:
            settings = file["lora/vars"]
            rank = int(settings["rank"][()])
            alpha = settings["alpha"][()] if "alpha" in settings else None
            alpha = None if alpha is None else check_positive("alpha", alpha)
            factors = {
                int(index): {name: group[f"vars/{name}"][()] for name in FACTORS}
                for index, group in file["lora"].items()
                if index != "vars"
            }
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise ValueError(
            f"{path} cannot be read as adapters of `save_lora_weights`: {error}. Load "
            "adapters of PEFT with `load_adapters`, and weights with `load_weights`."
        ) from error
    if not factors:
        raise ValueError(f"{path} contains no adapters. Save them again.")
    return rank, alpha, factors


def _check_shapes(path, index, layer, arrays, rank):
    found = tuple(array.shape for array in arrays.values())
    expected = None
    if isinstance(layer, Projection):
        outputs, inputs = layer.matrix_shape
        expected = (outputs, rank), (rank, inputs)
    if found != expected:
        raise ValueError(
            f"{path} has adapters of the shapes {found} for layer {index}, but this "
            f"model requires {expected}: the adapters belong to another model."
        )


def _unknown_alpha(path, own, rank):
    """Returns the alpha for a file without one: that of the model, or else the rank."""
    alphas = {adapter.alpha for adapter in own.values()} or {float(rank)}
    (alpha, *others) = sorted(alphas)
    if not others and alpha != rank:
        warnings.warn(
            f"{path} does not store alpha. That of this model is used: {alpha:g}. In "
            f"KerasHub it is the rank, {rank}.",
            stacklevel=4,
        )
    return alpha


def _add_adapters(backbone, path, layers, stored):
    targets = {adapter.target for adapter in stored.values()}
    missing = [
        layer.path
        for index, layer in layers.items()
        if layer.name in targets and index not in stored
    ]
    if missing:
        raise ValueError(
            f"{path} has no adapters for {format_names(missing)}. Adapters of only "
            "some decoder layers are not supported."
        )
    adapter = next(iter(stored.values()))
    names = [name for name in PROJECTIONS if name in targets]
    backbone.enable_lora(adapter.rank, names, adapter.alpha)
