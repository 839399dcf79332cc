"""Attention by the kernels that accelerators are fastest with, for training on JAX."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from keras_openllama.distribution import LANES, ROWS
from keras_openllama.layers.attention import attend_to_past

# Ours: rows and columns of scores that the kernel has in a TPU core's memory. Larger
# ones are faster, and 16 MiB (v4) has no room for more. A multiple of `LANES`.
BLOCK = 512


def attention_on(device, mesh=None):
    """What attends to the past on a kind of device.

    Args:
        device: `jax.Device`, one of those that the program is for.
        mesh: `jax.sharding.Mesh` with the axes of `distribution.make_mesh`, or `None`.

    Returns:
        A callable `(query, key, value, mask, documents)`: what `attend_to_past` takes,
        and int `(batch, length)`, the number of the document of each token, 0 on
        padding; it returns what `attend_to_past` does.
    """
    if device.platform == "tpu":
        return lambda query, key, value, mask, documents: splash_attention(
            query, key, value, documents, mesh
        )
    if device.platform == "gpu" and "cuda" in device.client.platform_version:
        return lambda query, key, value, mask, documents: cudnn_attention(
            query, key, value, mask
        )
    return lambda query, key, value, mask, documents: attend_to_past(
        query, key, value, mask
    )


def splash_attention(query, key, value, documents, mesh=None, interpret=False):
    """Causal attention within documents by JAX's Splash kernel for TPUs.

    Scores never leave a core, neither in the forward pass nor in the backward one, and
    blocks that causality hides are not computed. What padding attends to differs from
    `attend_to_past`, and nothing reads it.

    Args:
        query: `(batch, num_query_heads, length, head_dim)`.
        key, value: `(batch, num_key_value_heads, length, head_dim)`.
        documents: int `(batch, length)`, see `attention_on`.
        mesh: see `attention_on`. Each device runs the kernel on its rows and heads.
        interpret: bool, computes what the kernel would, on any platform, slowly.

    Returns:
        `(batch, num_query_heads, length, head_dim)` in the dtype of `value`.

    Source: `jax/experimental/pallas/ops/tpu/splash_attention` in `jax-ml/jax`.
    """
    attend = functools.partial(_attend_with_splash, interpret=interpret)
    if mesh is None:
        return attend(query, key, value, documents)
    by_head = PartitionSpec(ROWS, "model", None, None)
    return jax.shard_map(
        attend,
        mesh=mesh,
        in_specs=(by_head, by_head, by_head, PartitionSpec(ROWS, None)),
        out_specs=by_head,
        check_vma=False,  # A kernel does not say over which axes its results vary.
    )(query, key, value, documents)


def _attend_with_splash(query, key, value, documents, interpret):
    # Here, as it takes most of a second to import, which only TPUs need.
    from jax.experimental.pallas.ops.tpu.splash_attention import SegmentIds

    _, heads, length, head_dim = query.shape
    # The kernel does not scale. In float32, since bfloat16 has no 1/sqrt(100).
    query = (query.astype("float32") * head_dim**-0.5).astype(query.dtype)
    padding = -length % LANES
    if padding:
        rows = (0, 0), (0, 0), (0, padding), (0, 0)
        query, key, value = (jnp.pad(x, rows) for x in (query, key, value))
        documents = jnp.pad(documents, ((0, 0), (0, padding)))
    kernel = _kernel(heads, length + padding, interpret)
    context = jax.vmap(kernel)(query, key, value, SegmentIds(documents, documents))
    return context[:, :, :length].astype(value.dtype)


def _kernel(heads, length, interpret):
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    block = next(b for b in range(BLOCK, 0, -LANES) if length % b == 0)
    mask = splash.MultiHeadMask([splash.CausalMask((length, length))] * heads)
    return splash.make_splash_mha(
        mask,
        head_shards=1,
        q_seq_shards=1,
        block_sizes=splash.BlockSizes(
            block_q=block,
            block_kv=block,
            block_q_dkv=block,
            block_kv_dkv=block,
            use_fused_bwd_kernel=True,
        ),
        interpret=interpret,
    )


def cudnn_attention(query, key, value, mask):
    """`attend_to_past` by cuDNN's kernel, where it has one.

    It has none for float32 and for odd lengths; there XLA computes. Heads are padded to
    a multiple of 8, as the kernel wants them.

    Args:
        query, key, value, mask: see `attend_to_past`.

    Returns:
        As `attend_to_past`.
    """
    length, head_dim = query.shape[2:]
    if query.dtype.itemsize > 2 or length % 2:
        return attend_to_past(query, key, value, mask)
    padding = (0, 0), (0, 0), (0, 0), (0, -head_dim % 8)
    context = jax.nn.dot_product_attention(
        *(jnp.swapaxes(jnp.pad(x, padding), 1, 2) for x in (query, key, value)),
        mask=mask,
        is_causal=True,  # The mask says so, too; but the kernel does not look ahead.
        scale=head_dim**-0.5,
        implementation="cudnn",
    )
    return jnp.swapaxes(context, 1, 2)[..., :head_dim]
