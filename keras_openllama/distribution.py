"""How a model is spread over devices: a mesh of data x fsdp x model (JAX only).

Every matrix is sharded over `fsdp` (ZeRO stage 3, arXiv:1910.02054) and over `model`
(arXiv:1909.08053); a batch over `data` and `fsdp` together. So `data` copies of the
model exist, each spread over `fsdp * model` devices (hybrid sharding).
"""

import itertools
import math
import re

import keras
import numpy as np

from keras_openllama.backend.keras_private import variable_layout
from keras_openllama.config import MESH_AXES, checked

BATCH_AXES = ("data", "fsdp")  # The axes that share the rows of a batch.
LANES = 128  # The width of a TPU's vector registers.

# Kernels are (outputs, inputs). What heads, the feed-forward network and the vocabulary
# divide is on the model's axis, the rest on that of fsdp. (But see `_divides_outputs`.)
_LAYOUTS = {
    r"token_embedding/embeddings": ("model", "data"),
    r"transformer_layer_\d+/self_attention/(query|key|value)/kernel": ("model", "data"),
    r"transformer_layer_\d+/self_attention/output/kernel": ("data", "model"),
    r"transformer_layer_\d+/feedforward/(gate|up)/kernel": ("model", "data"),
    r"transformer_layer_\d+/feedforward/down/kernel": ("data", "model"),
    r"lm_head/kernel": ("model", "data"),
}


def make_mesh(data=1, fsdp=None, model=1, devices=None):
    """A mesh of devices.

    Args:
        data: int, copies of the model; each sees another part of the batch.
        fsdp: int, devices that share a copy and its part of the batch; all that are
            left if `None`.
        model: int, devices that share each row of the batch, by heads and width.
        devices: list of JAX devices; all of them unless given.

    Returns:
        `keras.distribution.DeviceMesh` with the axes `"data"`, `"fsdp"`, `"model"`.

    Raises:
        ValueError: if the sizes do not multiply to the number of devices.

    Example:

    ```python
    distribution = OpenLlamaParallel(make_mesh(data=2, fsdp=4))
    with distribution.scope():
        lm = OpenLlamaCausalLM.from_preset("open_llama_3b_v2")
    ```
    """
    if devices is None:
        devices = keras.distribution.list_devices()
    count = len(devices)
    if fsdp is None:
        fsdp = max(1, count // max(1, data * model))
    shape = (data, fsdp, model)
    if math.prod(shape) != count or min(shape) < 1:
        raise ValueError(
            f"The sizes of a mesh multiply to the number of devices, {count}. "
            f"Received: data={data}, fsdp={fsdp}, model={model}"
        )
    return keras.distribution.DeviceMesh(shape, MESH_AXES, np.array(devices))


def layout_map(device_mesh, model_axis="model", data_axis="fsdp"):
    """Which axis of a mesh divides which axis of each matrix.

    Args:
        device_mesh: `keras.distribution.DeviceMesh`.
        model_axis: string, the axis that divides heads, widths and vocabulary.
        data_axis: string, the axis that divides the rest; also that of the batch.

    Returns:
        `keras.distribution.LayoutMap`. Norms are in it nowhere: every device has them.

    Raises:
        ValueError: if the mesh has no such axes.
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
        # A task and its optimizer put names of their own before a path.
        layouts[f"(.*/)?{pattern}"] = tuple(names[axis] for axis in axes)
    return layouts


class _JointLayout(keras.distribution.TensorLayout):
    """The first axis over several axes of the mesh: Keras's own layout cannot say it.

    Args:
        first: tuple of strings, axes of the mesh.
        rank: int, of the tensor.
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
    """Distribution of an OpenLLaMA model; a batch goes over `data` and `fsdp`.

    Everything that is built inside its `scope()`, the optimizer too, is created
    sharded. In several processes each passes its own rows of the batch.

    Args:
        device_mesh: `keras.distribution.DeviceMesh` of `make_mesh`.

    Raises:
        RuntimeError: if the backend is not JAX.
        ValueError: for a matrix that no rule covers, when it is created.

    Example: see `make_mesh`.
    """

    def __init__(self, device_mesh):
        if keras.config.backend() != "jax":
            raise RuntimeError(
                "A model is distributed on the JAX backend only (KERAS_BACKEND=jax). "
                f"Received: backend={keras.config.backend()!r}"
            )
        self._layouts = layout_map(device_mesh)
        super().__init__(
            layout_map=self._layouts,
            batch_dim_name="data",
            auto_shard_dataset=False,
        )

    @property
    def num_model_replicas(self):
        # What Keras wants to know: into how many parts a batch goes.
        sizes = dict(
            zip(self.device_mesh.axis_names, self.device_mesh.shape, strict=True)
        )
        return sizes["data"] * sizes["fsdp"]

    def batch_sharding(self, rank=2):
        """`jax.sharding.NamedSharding` of an array whose first axis is the batch."""
        return self.get_data_layout((None,) * rank).backend_layout

    def get_data_layout(self, data_shape):
        return _JointLayout(BATCH_AXES, len(data_shape), self.device_mesh)

    def get_variable_layout(self, variable):
        is_matrix = re.search(r"(kernel|embeddings)$", variable.path) is not None
        unknown = (
            variable_layout(variable) is None and self._layouts[variable.path] is None
        )
        if is_matrix and unknown:
            raise ValueError(
                f"No rule of the layout covers the matrix {variable.path}: it would "
                "be on every device. OpenLlamaParallel is for OpenLLaMA models."
            )
        if variable_layout(variable) is None and self._divides_outputs(variable):
            return _JointLayout(("model", "fsdp"), 2, self.device_mesh)
        return super().get_variable_layout(variable)

    def _divides_outputs(self, variable):
        """Whether both axes divide the outputs of a matrix, and none its inputs.

        Ours, by what the TPU compiler makes of it: a matrix that was divided by inputs
        is put together with its outputs side by side in memory. Queries, keys and
        values come out faster otherwise; so do gate and up where their width does not
        fill vectors, as the 8640 of 3B. (At 7B and 13B they do not.)
        """
        kind = re.search(r"(query|key|value|gate|up)/kernel$", variable.path)
        if kind is None or variable.shape[0] % math.prod(self.device_mesh.shape[1:]):
            return False
        return kind[1] not in ("gate", "up") or variable.shape[0] % LANES > 0


def check_mesh(sizes, architecture, batch_size, micro_batches=1):
    """Raises a `ValueError` unless a mesh divides what it has to.

    Args:
        sizes: dict of ints, `"data"`, `"fsdp"` and `"model"`.
        architecture: dict, arguments of `OpenLlamaBackbone`.
        batch_size: int, rows of a batch, over all devices.
        micro_batches: int, parts of a batch that follow each other.

    The message has the meshes of as many devices that would fit.
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
            f"Of {count} devices these do: {' | '.join(fitting)}."
            if fitting
            else f"No mesh of {count} devices does; change their number or the batch."
        )
    )


def check_hosts(mesh):
    """Raises a `ValueError` where processes would share a row of the batch.

    Each reads rows of its own.

    Args:
        mesh: `jax.sharding.Mesh` with the axes of `make_mesh`.
    """
    for devices in mesh.devices.reshape(-1, mesh.shape["model"]):
        processes = {device.process_index for device in devices}
        if len(processes) > 1:
            raise ValueError(
                f"Devices that share rows of the batch are of one process. The mesh "
                f"has model={mesh.shape['model']}, across processes "
                f"{sorted(processes)}. Let model divide the devices of a process."
            )


def _problems(sizes, architecture, rows):
    parts = sizes["data"] * sizes["fsdp"]
    architecture = checked(architecture)
    heads, key_value_heads = (
        architecture[name] for name in ("num_query_heads", "num_key_value_heads")
    )
    rules = [
        ("fsdp", sizes["fsdp"], "hidden_dim", architecture["hidden_dim"]),
        ("model", sizes["model"], "num_query_heads", heads),
        ("model", sizes["model"], "num_key_value_heads", key_value_heads),
        ("model", sizes["model"], "intermediate_dim", architecture["intermediate_dim"]),
        ("model", sizes["model"], "vocabulary_size", architecture["vocabulary_size"]),
        ("data * fsdp", parts, "the rows of a (micro-)batch", rows),
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
