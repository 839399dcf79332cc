"""Projections whose weight gradients are reduced over a mesh by all-to-alls (JAX)."""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING

import keras

from keras_openllama.backend.keras_private import variable_layout
from keras_openllama.distribution import BATCH_AXES

if keras.config.backend() == "jax":
    import jax
    import jax.numpy as jnp
    from jax.sharding import PartitionSpec as P

if TYPE_CHECKING:
    from jax.sharding import Mesh

_mesh: contextvars.ContextVar[Mesh | None] = contextvars.ContextVar(
    "mesh_of_gradients", default=None
)


@contextlib.contextmanager
def reduce_gradients_by_all_to_all(mesh: Mesh | None) -> Iterator[None]:
    """Lets the projections inside the block reduce their gradients by all-to-alls.

    Args:
        mesh: Mesh with the axes of `distribution.make_mesh`, over which the kernels are
            sharded as by `OpenLlamaParallel`; `None` leaves the reduction to XLA.

    Raises:
        ValueError: If the mesh shards the model, too.

    Example:
        >>> with reduce_gradients_by_all_to_all(None):
        ...     mesh_of_gradients() is None
        True
    """
    if mesh is not None and mesh.shape["model"] > 1:
        raise ValueError(
            "Gradients can be reduced by all-to-alls only on a mesh with model=1. "
            f"Received: mesh={dict(mesh.shape)}"
        )
    token = _mesh.set(mesh)
    try:
        yield
    finally:
        _mesh.reset(token)


def mesh_of_gradients() -> Mesh | None:
    """Returns the mesh of the block that the caller is in, or `None`."""
    return _mesh.get()


def project_sharded(inputs: jax.Array, kernel: keras.Variable, mesh: Mesh) -> jax.Array:
    """Returns `inputs @ kernel.T`; an all-to-all reduces the gradient of the kernel.

    In the backward pass, each device sends every other one that one's shard of its
    gradient, and adds up what it receives in float32. That is a reduce-scatter, with
    as many bytes sent by each device. But the TPU compiler makes an all-reduce of a
    reduce-scatter over a whole slice, which is twice as much and is not overlapped with
    computation, whereas all-to-alls are.

    Args:
        inputs: Float array `(batch, length, inputs)`, its first axis sharded over
            `data` and `fsdp`.
        kernel: Variable `(outputs, inputs)`, one of its axes sharded over `fsdp`.
        mesh: Mesh with the axes of `distribution.make_mesh`, `model` of 1.

    Returns:
        Array `(batch, length, outputs)`.

    Raises:
        ValueError: If the kernel is not sharded over `fsdp`.
    """
    spec = variable_layout(kernel).backend_layout.spec
    sharded = [i for i, names in enumerate(spec) if "fsdp" in _as_tuple(names)]
    if len(sharded) != 1:
        raise ValueError(
            f"The kernel must be sharded over fsdp. Received: {kernel.path}, {spec}"
        )
    return _project(inputs, keras.ops.convert_to_tensor(kernel), mesh, sharded[0])


def _as_tuple(names):
    return names if isinstance(names, tuple) else (names,)


def _multiply(inputs, kernel, mesh, axis):
    return jnp.einsum("bti,oi->bto", inputs, kernel)


def _forward(inputs, kernel, mesh, axis):
    return _multiply(inputs, kernel, mesh, axis), (inputs, kernel)


def _backward(mesh, axis, residuals, gradient):
    inputs, kernel = residuals
    inputs_gradient = jnp.einsum("bto,oi->bti", gradient, kernel)
    # With the sharded axis first, the shards to send are contiguous.
    operands = (gradient, inputs) if axis == 0 else (inputs, gradient)
    batch, shard = P(BATCH_AXES, None, None), P("fsdp", None)
    reduced = jax.shard_map(
        functools.partial(_reduce_scatter, mesh.shape["fsdp"]),
        mesh=mesh,
        in_specs=(batch, batch),
        out_specs=shard,
        check_vma=False,
    )(*operands)
    kernel_gradient = reduced if axis == 0 else reduced.T
    return inputs_gradient, kernel_gradient.astype(kernel.dtype)


def _reduce_scatter(devices, rows, columns):
    """Sums `rows.T @ columns` over the devices; returns the device's shard of rows."""
    part = jnp.einsum("btr,btc->rc", rows, columns)
    shards = part.reshape(devices, -1, part.shape[1])
    received = jax.lax.all_to_all(shards, "fsdp", 0, 0, tiled=True)
    # One addition after the other: a TPU takes three times as long for `jnp.sum`.
    total = sum(shard.astype("float32") for shard in received)
    return jax.lax.psum(total, "data")


if keras.config.backend() == "jax":
    _project = jax.custom_vjp(_multiply, nondiff_argnums=(2, 3))
    _project.defvjp(_forward, _backward)
