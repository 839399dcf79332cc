"""Embeddings of tokens on a mesh, where a device has a part of their table (JAX)."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from keras_openllama.distribution import ROWS


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def look_up(table, token_ids, mesh, dtype):
    """Rows of a table, for the tokens of a batch.

    Each device gathers its part of the vocabulary, in the dtype of the result; its
    gradient adds up in float32 and is then reduced to the device's part. XLA, left
    alone, would reduce the gradient of the whole table over all devices.

    Args:
        table: float32 `(vocabulary_size, hidden_dim)`, over `model` and `fsdp`.
        token_ids: int `(batch, length)`, its rows over `data` and `fsdp`.
        mesh: `jax.sharding.Mesh` with the axes of `distribution.make_mesh`.
        dtype: string.

    Returns:
        `(batch, length, hidden_dim)` in that dtype.
    """

    def of_device(table, token_ids):
        table = jax.lax.all_gather(table.astype(dtype), "fsdp", axis=1, tiled=True)
        rows, here = _own(token_ids, len(table))
        found = jnp.where(here[..., None], jnp.take(table, rows, axis=0), 0)
        return jax.lax.psum(found, "model") if mesh.shape["model"] > 1 else found

    return _on_each_device(mesh, of_device, _TABLE, _IDS, P(ROWS, None, None))(
        table, token_ids
    )


def _forward(table, token_ids, mesh, dtype):
    return look_up(table, token_ids, mesh, dtype), (table, token_ids)


def _backward(mesh, dtype, residuals, gradient):
    table, token_ids = residuals
    vocabulary_size = len(table) // mesh.shape["model"]

    def of_device(token_ids, gradient):
        rows, here = _own(token_ids, vocabulary_size)
        gradient = jnp.where(here[..., None], gradient.astype("float32"), 0)
        total = jnp.zeros((vocabulary_size, gradient.shape[-1]), "float32")
        total = jax.lax.psum_scatter(
            total.at[rows].add(gradient), "fsdp", scatter_dimension=1, tiled=True
        )
        return jax.lax.psum(total, "data")

    reduced = _on_each_device(mesh, of_device, _IDS, P(ROWS, None, None), _TABLE)
    return reduced(token_ids, gradient).astype(table.dtype), None


look_up.defvjp(_forward, _backward)

_TABLE, _IDS = P("model", "fsdp"), P(ROWS, None)


def _own(token_ids, vocabulary_size):
    """Rows of a device's part of the table, and which tokens are in it."""
    rows = token_ids - jax.lax.axis_index("model") * vocabulary_size
    here = (rows >= 0) & (rows < vocabulary_size)
    return jnp.where(here, rows, 0), here


def _on_each_device(mesh, compute, *specs):
    *inputs, output = specs
    return jax.shard_map(
        compute, mesh=mesh, in_specs=tuple(inputs), out_specs=output, check_vma=False
    )
