"""Embedding lookup in a table that is sharded over a mesh (JAX)."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from keras_openllama.distribution import BATCH_AXES


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def embedding_lookup(
    table: jax.Array, token_ids: jax.Array, mesh: jax.sharding.Mesh, dtype: str
) -> jax.Array:
    """Looks up the embeddings of a batch of tokens.

    Each device gathers its shard of the vocabulary in the dtype of the result. In the
    backward pass it accumulates the gradient in float32 and reduce-scatters it to its
    shard. XLA's default would all-reduce the gradient of the whole table.

    Args:
        table: float32 array `(vocabulary_size, hidden_dim)`, sharded over `model` and
            `fsdp`.
        token_ids: Int array `(batch, length)`, its first axis sharded over `data` and
            `fsdp`.
        mesh: Mesh with the axes of `distribution.make_mesh`.
        dtype: dtype of the result.

    Returns:
        Array `(batch, length, hidden_dim)` of `dtype`.

    Example:
        >>> from keras_openllama.distribution import make_mesh
        >>> mesh = make_mesh(devices=jax.devices()[:1]).backend_mesh
        >>> ids = jnp.array([[2, 0]])
        >>> embedding_lookup(jnp.eye(3), ids, mesh, "float32").tolist()
        [[[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]]
    """

    def of_device(table, token_ids):
        table = jax.lax.all_gather(table.astype(dtype), "fsdp", axis=1, tiled=True)
        rows, is_local = _local_rows(token_ids, len(table))
        found = jnp.where(is_local[..., None], jnp.take(table, rows, axis=0), 0)
        return jax.lax.psum(found, "model") if mesh.shape["model"] > 1 else found

    return _on_each_device(mesh, of_device, _TABLE, _IDS, P(BATCH_AXES, None, None))(
        table, token_ids
    )


def _forward(table, token_ids, mesh, dtype):
    return embedding_lookup(table, token_ids, mesh, dtype), (table, token_ids)


def _backward(mesh, dtype, residuals, gradient):
    table, token_ids = residuals
    vocabulary_size = len(table) // mesh.shape["model"]

    def of_device(token_ids, gradient):
        rows, is_local = _local_rows(token_ids, vocabulary_size)
        gradient = jnp.where(is_local[..., None], gradient.astype("float32"), 0)
        total = jnp.zeros((vocabulary_size, gradient.shape[-1]), "float32")
        total = jax.lax.psum_scatter(
            total.at[rows].add(gradient), "fsdp", scatter_dimension=1, tiled=True
        )
        return jax.lax.psum(total, "data")

    reduced = _on_each_device(mesh, of_device, _IDS, P(BATCH_AXES, None, None), _TABLE)
    return reduced(token_ids, gradient).astype(table.dtype), None


embedding_lookup.defvjp(_forward, _backward)

_TABLE, _IDS = P("model", "fsdp"), P(BATCH_AXES, None)


def _local_rows(token_ids, vocabulary_size):
    """Row of each token in the device's shard of the table, and whether it is there."""
    rows = token_ids - jax.lax.axis_index("model") * vocabulary_size
    is_local = (rows >= 0) & (rows < vocabulary_size)
    return jnp.where(is_local, rows, 0), is_local


def _on_each_device(mesh, compute, *specs):
    *inputs, output = specs
    return jax.shard_map(
        compute, mesh=mesh, in_specs=tuple(inputs), out_specs=output, check_vma=False
    )
