"""Sharding of a model over a device mesh of data x fsdp x model (JAX only).

Every matrix is sharded over `fsdp` (ZeRO stage 3, arXiv:1910.02054) and over `model`
(tensor parallelism, arXiv:1909.08053); a batch over `data` and `fsdp` together. So
there are `data` replicas of the model, each sharded over `fsdp * model` devices (hybrid
sharding).
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import keras
import numpy as np

from keras_openllama.backend.keras_private import variable_layout
from keras_openllama.config import MESH_AXES, validate_architecture

if TYPE_CHECKING:
    import jax

BATCH_AXES = ("data", "fsdp")  # The mesh axes that a batch is sharded over.
LANES = 128  # Width of a TPU's vector registers.

# Kernels are (outputs, inputs). Heads, the width of the feed-forward network and the
# vocabulary are sharded over the model axis, the other dimension over fsdp. (But see
# `_shards_outputs_only`.)
_LAYOUTS = {
    r"token_embedding/embeddings": ("model", "data"),
    r"transformer_layer_\d+/self_attention/(query|key|value)/kernel": ("model", "data"),
    r"transformer_layer_\d+/self_attention/output/kernel": ("data", "model"),
    r"transformer_layer_\d+/feedforward/(gate|up)/kernel": ("model", "data"),
    r"transformer_layer_\d+/feedforward/down/kernel": ("data", "model"),
    r"lm_head/kernel": ("model", "data"),
}


def make_mesh(
    data: int = 1,
    fsdp: int | None = None,
    model: int = 1,
    devices: Sequence[Any] | None = None,
) -> keras.distribution.DeviceMesh:
    """Creates a device mesh.

    Args:
        data: Replicas of the model; each computes a different part of the batch.
        fsdp: Devices that share a replica and its part of the batch. `None` stands for
            all remaining devices.
        model: Devices that share each sequence of the batch, by heads and widths.
        devices: JAX devices. `None` stands for all of them.

    Returns:
        `keras.distribution.DeviceMesh` with the axes `"data"`, `"fsdp"` and `"model"`.

    Raises:
        ValueError: If the product of the sizes is not the number of devices.

    Example:
        >>> from keras_openllama import OpenLlamaCausalLM
        >>> distribution = OpenLlamaParallel(make_mesh(data=1, model=1))
        >>> with distribution.scope():
        ...     model = OpenLlamaCausalLM.from_preset("open_llama_nano")
    """
    if devices is None:
        devices = keras.distribution.list_devices()
    count = len(devices)
    if fsdp is None:
        fsdp = max(1, count // max(1, data * model))
    shape = (data, fsdp, model)
    if math.prod(shape) != count or min(shape) < 1:
        raise ValueError(
            f"The product of the mesh sizes must be the number of devices, {count}. "
            f"Received: data={data}, fsdp={fsdp}, model={model}"
        )
    return keras.distribution.DeviceMesh(shape, MESH_AXES, np.array(devices))


def layout_map(
    device_mesh: keras.distribution.DeviceMesh,
    model_axis: str = "model",
    data_axis: str = "fsdp",
) -> keras.distribution.LayoutMap:
    """Returns the sharding of each matrix over a mesh.

    Args:
        device_mesh: The mesh.
        model_axis: Mesh axis for heads, widths and vocabulary.
        data_axis: Mesh axis for the other dimension, also that of the batch.

    Returns:
        The layout of each matrix by a pattern of its path. Norms are not included:
        they are replicated.

    Raises:
        ValueError: If the mesh has no such axes.

    Example:
        >>> layouts = layout_map(make_mesh())
        >>> layouts["lm_head/kernel"].axes
        ('model', 'fsdp')
    """
    for axis in (model_axis, data_axis):
        if axis not in device_mesh.axis_names:
            raise ValueError(
                f"The mesh has no axis {axis!r}. It has: "
                f"{', '.join(device_mesh.axis_names)}."
            )
    names = {"model": model_axis, "data": data_axis}
    layouts = keras.distribution.LayoutMap(device_mesh)
    for pattern, axes in _LAYOUTS.items():
        # The paths of a task and of an optimizer have a prefix.
        layouts[f"(.*/)?{pattern}"] = tuple(names[axis] for axis in axes)
    return layouts


class _JointLayout(keras.distribution.TensorLayout):
    """Shards the first dimension over several mesh axes, which Keras does not support.

    Args:
        first: tuple of strings, axes of the mesh.
        rank: int, rank of the tensor.
        device_mesh: `keras.distribution.DeviceMesh`.
    """

    def __init__(self, first, rank, device_mesh):
        super().__init__((first[0], *[None] * (rank - 1)), device_mesh)
        self._first = first

    @property
    def backend_layout(self):
        from jax.sharding import NamedSharding, PartitionSpec

        spec = PartitionSpec(self._first, *self.axes[1:])
        return NamedSharding(self.device_mesh.backend_mesh, spec)


class OpenLlamaParallel(keras.distribution.ModelParallel):
    """Distribution of an OpenLLaMA model over `data`, `fsdp` and `model`.

    Variables that are created inside its `scope()`, also those of the optimizer, are
    created sharded. Batches are sharded over `data` and `fsdp`. With several processes,
    each passes its own part of the batch.

    Args:
        device_mesh: `keras.distribution.DeviceMesh` of `make_mesh`.

    Raises:
        RuntimeError: if the backend is not JAX.
        ValueError: when a matrix is created that the layout map does not cover.

    Example:
        >>> distribution = OpenLlamaParallel(make_mesh())
        >>> tuple(distribution.batch_sharding(rank=2).spec)
        (('data', 'fsdp'), None)
    """

    def __init__(self, device_mesh: keras.distribution.DeviceMesh) -> None:
        if keras.config.backend() != "jax":
            raise RuntimeError(
                "OpenLlamaParallel needs the JAX backend (KERAS_BACKEND=jax). "
                f"Received: backend={keras.config.backend()!r}"
            )
        self._layouts = layout_map(device_mesh)
        super().__init__(
            layout_map=self._layouts,
            batch_dim_name="data",
            auto_shard_dataset=False,
        )

    @property
    def num_model_replicas(self) -> int:
        """Number of parts that a batch is sharded into, which Keras asks for."""
        sizes = dict(
            zip(self.device_mesh.axis_names, self.device_mesh.shape, strict=True)
        )
        return sizes["data"] * sizes["fsdp"]

    def batch_sharding(self, rank: int = 2) -> jax.sharding.NamedSharding:
        """Returns the sharding of an array whose first axis is the batch."""
        return self.get_data_layout((None,) * rank).backend_layout

    def get_data_layout(
        self, data_shape: Sequence[int | None]
    ) -> keras.distribution.TensorLayout:
        """Returns the layout of a batch."""
        return _JointLayout(BATCH_AXES, len(data_shape), self.device_mesh)

    def get_variable_layout(
        self, variable: keras.Variable
    ) -> keras.distribution.TensorLayout:
        """Returns the layout of a variable; raises for a matrix without a rule."""
        is_matrix = re.search(r"(kernel|embeddings)$", variable.path) is not None
        unknown = (
            variable_layout(variable) is None and self._layouts[variable.path] is None
        )
        if is_matrix and unknown:
            raise ValueError(
                f"The layout map has no rule for the matrix {variable.path}: it would "
                "be replicated. OpenLlamaParallel is for OpenLLaMA models."
            )
        if variable_layout(variable) is None and self._shards_outputs_only(variable):
            return _JointLayout(("model", "fsdp"), 2, self.device_mesh)
        return super().get_variable_layout(variable)

    def _shards_outputs_only(self, variable):
        """Whether to shard the outputs of a matrix over both axes, the inputs not.

        Heuristic, from the programs of the TPU compiler: after the all-gather of a
        matrix that was sharded over its inputs, its outputs are adjacent in memory.
        Queries, keys and values are computed faster in the other order, and so are gate
        and up if their width is not a multiple of the vector lanes, such as 8640 of 3B.
        (At 7B and 13B it is.)
        """
        kind = re.search(r"(query|key|value|gate|up)/kernel$", variable.path)
        if kind is None or variable.shape[0] % math.prod(self.device_mesh.shape[1:]):
            return False
        return kind[1] not in ("gate", "up") or variable.shape[0] % LANES > 0


def check_mesh(
    sizes: Mapping[str, int],
    architecture: Mapping[str, Any],
    batch_size: int,
    micro_batches: int = 1,
) -> None:
    """Checks that the sizes of a mesh divide what is sharded over it.

    Args:
        sizes: Sizes of the axes `"data"`, `"fsdp"` and `"model"`.
        architecture: Arguments of `OpenLlamaBackbone`.
        batch_size: Sequences per batch, over all devices.
        micro_batches: Number of micro-batches, the steps of gradient accumulation.

    Raises:
        ValueError: If they do not. The message lists meshes of as many devices that do.

    Example:
        >>> from keras_openllama import presets
        >>> architecture = presets.find("3b_v2").config
        >>> check_mesh({"data": 2, "fsdp": 4, "model": 1}, architecture, batch_size=8)
    """
    problems = _problems(sizes, architecture, batch_size // micro_batches)
    if not problems:
        return
    count = math.prod(sizes[axis] for axis in MESH_AXES)
    fitting = [
        ", ".join(f"{axis}={size}" for axis, size in candidate.items())
        for candidate in _meshes(count)
        if not _problems(candidate, architecture, batch_size // micro_batches)
    ]
    raise ValueError(
        f"The mesh {', '.join(f'{a}={sizes[a]}' for a in MESH_AXES)} does not fit: "
        f"{'; '.join(problems)}. "
        + (
            f"Meshes of {count} devices that fit: {' | '.join(fitting)}."
            if fitting
            else f"No mesh of {count} devices fits: change their number or the batch "
            "size."
        )
    )


def check_hosts(mesh: jax.sharding.Mesh) -> None:
    """Checks that devices that share sequences of the batch belong to one process.

    Each process reads its own sequences.

    Args:
        mesh: Mesh with the axes of `make_mesh`.

    Raises:
        ValueError: If the axis `model` spans several processes.

    Example:
        >>> check_hosts(make_mesh().backend_mesh)
    """
    for devices in mesh.devices.reshape(-1, mesh.shape["model"]):
        processes = {device.process_index for device in devices}
        if len(processes) > 1:
            raise ValueError(
                "The mesh axis `model` must not span several processes. Received: "
                f"model={mesh.shape['model']} across processes {sorted(processes)}. "
                "Let `model` divide the number of devices of a process."
            )


def _problems(sizes, architecture, sequences):
    parts = sizes["data"] * sizes["fsdp"]
    architecture = validate_architecture(architecture)
    heads, key_value_heads = (
        architecture[name] for name in ("num_query_heads", "num_key_value_heads")
    )
    rules = [
        ("fsdp", sizes["fsdp"], "hidden_dim", architecture["hidden_dim"]),
        ("model", sizes["model"], "num_query_heads", heads),
        ("model", sizes["model"], "num_key_value_heads", key_value_heads),
        ("model", sizes["model"], "intermediate_dim", architecture["intermediate_dim"]),
        ("model", sizes["model"], "vocabulary_size", architecture["vocabulary_size"]),
        ("data * fsdp", parts, "the sequences of a (micro-)batch", sequences),
    ]
    return [
        f"{axis} = {size} does not divide {name} = {value}"
        for axis, size, name, value in rules
        if value % size
    ]


def _meshes(count):
    divisors = [n for n in range(1, count + 1) if count % n == 0]
    for model, fsdp in itertools.product(divisors, divisors):
        if count % (model * fsdp) == 0:
            yield {"data": count // (model * fsdp), "fsdp": fsdp, "model": model}
