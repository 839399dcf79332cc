"""MaxText's training step of 2023, in which the published speeds on v4 and v5e ran.

The decoder is that of T5: attention and a feed-forward network without a gate work side
by side on the same normed states, the embedding is shared with the output, and there is
no RoPE. Layers are scanned and fully rematerialized, weights are in float32 and matrix
products in bfloat16.

Source: `MaxText/layers.py` and `MaxText/train.py` of
https://github.com/AI-Hypercomputer/maxtext at commits 281e04bf (April, v4) and 5ebcd67f
(October, v5e).
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec

from keras_openllama.layers.attention_kernels import splash_attention

BATCH_AXES = ("data", "fsdp")
BUCKETS, MAX_DISTANCE = 32, 128  # Of the relative position bias.
INPUTS = ("fsdp", None, None)


class Step:
    """What both steps share."""

    STACKED_AXIS = 1  # Axis of the layers in their weights, `param_scan_axis`.

    @staticmethod
    def weights(sizes):
        """Shapes and sharding of the weights, those of one layer under `"layers"`."""
        width, hidden = sizes["hidden_dim"], sizes["intermediate_dim"]
        heads = sizes["num_query_heads"], sizes["head_dim"]
        return {
            "embedding": ((sizes["vocabulary_size"], width), (None, "fsdp")),
            "norm": ((width,), (None,)),
            "layers": {
                "norm": ((width,), (None,)),
                "query": ((width, *heads), INPUTS),
                "key": ((width, *heads), INPUTS),
                "value": ((width, *heads), INPUTS),
                "output": ((*heads, width), (None, None, "fsdp")),
                "up": ((width, hidden), ("fsdp", None)),
                "down": ((hidden, width), (None, "fsdp")),
            },
        }

    @classmethod
    def make_loss(cls, sizes, mesh):
        """Returns the mean cross-entropy of weights, token IDs and targets."""
        del sizes

        def scanned(x, weights):
            return layer(x, weights, cls.attention, mesh), None

        def loss(params, ids, targets):
            table = params["embedding"]
            layers = {
                name: jnp.moveaxis(stacked, cls.STACKED_AXIS, 0)
                for name, stacked in params["layers"].items()
            }
            x, _ = jax.lax.scan(
                jax.checkpoint(scanned, prevent_cse=False),
                shard_batch(cls.embed(table, ids)),
                layers,
            )
            x = norm(x, params["norm"]).astype("float32")
            logits = shard_batch(x @ table.T) / math.sqrt(table.shape[1])
            return optax.softmax_cross_entropy_with_integer_labels(
                logits, targets
            ).mean()

        return loss


class April(Step):
    """On v4: naive attention with a relative position bias and normed queries."""

    OPTIMIZER = optax.adam(3e-5, b1=0.9, b2=0.95)

    @staticmethod
    def weights(sizes):
        heads, head_dim = sizes["num_query_heads"], sizes["head_dim"]
        found = Step.weights(sizes)
        found["layers"] |= {
            "query_norm": ((head_dim,), (None,)),
            "key_norm": ((head_dim,), (None,)),
            "position": ((heads, BUCKETS), (None, None)),
        }
        return found

    @staticmethod
    def embed(table, ids):
        return table.astype("bfloat16")[ids]

    @staticmethod
    def attention(query, key, value, weights, mesh):
        del mesh
        length = query.shape[1]
        query = norm(query, weights["query_norm"])
        key = norm(key, weights["key_norm"])
        scores = jnp.einsum("bqhd,bkhd->bhqk", query, key)
        one_hot = jax.nn.one_hot(buckets(length), BUCKETS, axis=0, dtype="bfloat16")
        position = weights["position"].astype("bfloat16")
        mask = jnp.where(jnp.tri(length, dtype=bool), 0, -1e10).astype("bfloat16")
        scores = scores + (mask + jnp.einsum("hn,nqk->hqk", position, one_hot))
        return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), value)


class October(Step):
    """On v5e: a kernel for attention, embedding lookup by a product, AdamW."""

    OPTIMIZER = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(3e-5, b1=0.9, b2=0.95, weight_decay=0.1),
    )

    @staticmethod
    def embed(table, ids):
        one_hot = jax.nn.one_hot(ids, table.shape[0], dtype="bfloat16")
        return one_hot @ table.astype("bfloat16")

    @staticmethod
    def attention(query, key, value, weights, mesh):
        del weights
        by_head = (jnp.swapaxes(x, 1, 2) for x in (query, key, value))
        documents = jnp.ones(query.shape[:2], "int32")
        return jnp.swapaxes(splash_attention(*by_head, documents, mesh), 1, 2)


def buckets(length):
    """The bucket of each distance between a query and a key, as in T5."""
    distance = np.maximum(np.subtract.outer(np.arange(length), np.arange(length)), 0)
    exact = BUCKETS // 2
    scale = (BUCKETS - exact) / math.log(MAX_DISTANCE / exact)
    far = exact + (np.log(np.maximum(distance, exact) / exact) * scale).astype(int)
    return np.where(distance < exact, distance, np.minimum(far, BUCKETS - 1))


def shard_batch(x):
    return jax.lax.with_sharding_constraint(x, PartitionSpec(BATCH_AXES))


def norm(x, scale):
    """RMSNorm, whose statistics are in float32."""
    wide = x.astype("float32")
    wide = wide * jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + 1e-6)
    return wide.astype("bfloat16") * scale.astype("bfloat16")


def layer(x, weights, attention, mesh):
    x = shard_batch(x)
    normed = norm(x, weights["norm"])
    query, key, value = (
        shard_batch(
            jnp.einsum("ble,ehd->blhd", normed, weights[name].astype("bfloat16"))
        )
        for name in ("query", "key", "value")
    )
    mixed = attention(query, key, value, weights, mesh)
    output = weights["output"].astype("bfloat16")
    attended = shard_batch(jnp.einsum("blhd,hde->ble", mixed, output))
    wide = shard_batch(jax.nn.relu(normed @ weights["up"].astype("bfloat16")))
    return shard_batch(x + wide @ weights["down"].astype("bfloat16") + attended)
