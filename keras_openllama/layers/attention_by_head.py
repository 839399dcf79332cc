"""Causal attention on CPUs with JAX: one head after the other.

XLA on a CPU computes a batch of small matrix products several times as slowly as the
same products one by one, and the scores of one head stay in the processor's cache
(`benchmarks/README.md`).
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from keras_openllama.layers.cached_attention import MASKED_SCORE


def attend_by_head(
    query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array, block: int
) -> jax.Array:
    """`attention.causal_attention`, computed in float32.

    The backward pass recomputes the attention weights.

    Args:
        query: float `(batch, num_query_heads, length, head_dim)`.
        key: float `(batch, num_key_value_heads, length, head_dim)`.
        value: float, of the shape of `key`.
        mask: bool `(batch or 1, 1, length, length)`, False for every later position.
        block: number of queries that are computed together, over the keys up to the
            last of them.

    Returns:
        Array of the shape of `query` with the dtype of `value`.

    Example:
        >>> x, mask = jnp.ones((2, 4, 6, 8)), jnp.tril(jnp.ones((1, 1, 6, 6), bool))
        >>> attend_by_head(x, x, x, mask, block=4).shape
        (2, 4, 6, 8)
    """
    heads, length, head_dim = key.shape[1:]

    def attend(inputs):
        number, *tensors = inputs
        row = number // heads if len(mask) > 1 else 0
        return _attend_head(*tensors, mask[row, 0], block)

    by_head = (x.reshape(-1, *x.shape[2:]) for x in (key, value))
    # The query heads that share a key/value head.
    groups = query.reshape(len(key) * heads, -1, length, head_dim)
    context = jax.lax.map(attend, (jnp.arange(len(groups)), groups, *by_head))
    return context.reshape(query.shape).astype(value.dtype)


def _attend_head(queries, key, value, mask, block):
    """Attention of `(group, length, head_dim)` to a `(length, head_dim)`."""
    length = len(key)
    contexts = []
    for start in range(0, length, block):
        end = min(start + block, length)
        # In the loop over the heads, XLA does recompute what JAX tells it to.
        attend = jax.checkpoint(functools.partial(_attend_block, start, end))
        contexts.append(attend(queries, key, value, mask))
    return jnp.concatenate(contexts, axis=1)


def _attend_block(start, end, queries, key, value, mask):
    """Attention of the queries from `start` to `end`.

    All arrays are matrices: XLA is slower with more axes, even of size 1.
    """
    group, _, head_dim = queries.shape
    # Here, so that the backward pass does not keep copies in float32.
    queries, key, value = (x.astype("float32") for x in (queries, key, value))
    rows = queries[:, start:end].reshape(-1, head_dim) * head_dim**-0.5
    visible = jnp.broadcast_to(mask[start:end, :end], (group, end - start, end))
    scores = jnp.where(visible.reshape(-1, end), rows @ key[:end].T, MASKED_SCORE)
    context = jax.nn.softmax(scores, axis=-1) @ value[:end]
    return context.reshape(group, end - start, head_dim)
