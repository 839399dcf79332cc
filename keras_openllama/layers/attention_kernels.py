"""Fused attention kernels of accelerators and CPUs (JAX)."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from keras_openllama.distribution import BATCH_AXES, LANES
from keras_openllama.layers.attention import causal_attention, causal_mask
from keras_openllama.layers.compiled_attention_jax import (
    compiled_causal_attention,
    is_compiled,
)

# Heuristic: rows and columns of the score block that the Splash kernel holds in the
# memory of a TPU core. Larger blocks are faster, but do not fit into 16 MiB (v4). A
# multiple of `LANES`.
SPLASH_BLOCK = 512
# What cuDNN's fused kernel supports: GPUs from Ampere on (not V100 and T4), and heads
# up to this size (up to 256 from Hopper on, which no OpenLLaMA model needs).
MIN_COMPUTE_CAPABILITY, MAX_HEAD_DIM = 8.0, 128


def select_attention(
    device: jax.Device, mesh: jax.sharding.Mesh | None = None
) -> Callable[[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]:
    """Selects the causal attention function for a kind of device.

    Args:
        device: One of the devices that the program is compiled for.
        mesh: Mesh with the axes of `distribution.make_mesh`, or `None`.

    Returns:
        A callable `(query, key, value, mask, documents)`. The first four are the
        arguments of `causal_attention`; `documents` is an int array
        `(batch, length)`, the index of each token's document, 0 on padding. It
        returns what `causal_attention` returns.

    Example:
        >>> attention = select_attention(jax.devices("cpu")[0])
        >>> query = jnp.ones((1, 2, 3, 8))
        >>> mask, documents = jnp.ones((1, 1, 3, 3), bool), jnp.ones((1, 3), int)
        >>> attention(query, query, query, mask, documents).shape
        (1, 2, 3, 8)
    """
    if device.platform == "tpu":
        return lambda query, key, value, mask, documents: splash_attention(
            query, key, value, documents, mesh
        )
    if _has_cudnn(device):
        return cudnn_attention
    if device.platform == "cpu" and mesh is None and is_compiled():
        return lambda query, key, value, mask, documents: compiled_causal_attention(
            query, key, value, mask
        )
    return lambda query, key, value, mask, documents: causal_attention(
        query, key, value, mask
    )


def splash_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    documents: jax.Array,
    mesh: jax.sharding.Mesh | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Causal attention within documents by JAX's Splash kernel for TPUs.

    The scores never leave a core, neither in the forward nor in the backward pass, and
    blocks that are fully masked by causality are skipped. The output at padding differs
    from `causal_attention`; nothing uses it.

    Args:
        query: Float array `(batch, num_query_heads, length, head_dim)`.
        key: Float array `(batch, num_key_value_heads, length, head_dim)`.
        value: Float array of the shape of `key`.
        documents: Int array `(batch, length)`, see `select_attention`.
        mesh: See `select_attention`. Each device runs the kernel on its own sequences
            and heads.
        interpret: Whether to emulate the kernel, slowly, on any platform.

    Returns:
        Array `(batch, num_query_heads, length, head_dim)` with the dtype of `value`.

    Source: `jax/experimental/pallas/ops/tpu/splash_attention` in `jax-ml/jax`.
    """
    attend = functools.partial(_attend_with_splash, interpret=interpret)
    if mesh is None:
        return attend(query, key, value, documents)
    by_head = PartitionSpec(BATCH_AXES, "model", None, None)
    return jax.shard_map(
        attend,
        mesh=mesh,
        in_specs=(by_head, by_head, by_head, PartitionSpec(BATCH_AXES, None)),
        out_specs=by_head,
        check_vma=False,  # Kernels do not declare the axes that results vary over.
    )(query, key, value, documents)


def _attend_with_splash(query, key, value, documents, interpret):
    # Imported late: it takes most of a second, and only TPUs need it.
    from jax.experimental.pallas.ops.tpu.splash_attention import SegmentIds

    _, heads, length, head_dim = query.shape
    # The kernel does not scale. In float32: bfloat16 cannot represent 1/sqrt(100).
    query = (query.astype("float32") * head_dim**-0.5).astype(query.dtype)
    padding = -length % LANES
    if padding:
        widths = (0, 0), (0, 0), (0, padding), (0, 0)
        query, key, value = (jnp.pad(x, widths) for x in (query, key, value))
        documents = jnp.pad(documents, ((0, 0), (0, padding)))
    kernel = _splash_kernel(heads, length + padding, interpret)
    context = jax.vmap(kernel)(query, key, value, SegmentIds(documents, documents))
    return context[:, :, :length].astype(value.dtype)


def _splash_kernel(heads, length, interpret):
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    block = next(b for b in range(SPLASH_BLOCK, 0, -LANES) if length % b == 0)
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


def select_prefill_attention(
    device: jax.Device,
) -> Callable[[jax.Array, jax.Array, jax.Array], jax.Array] | None:
    """Selects the attention of a prompt's first chunk to itself.

    Args:
        device: One of the devices that the program is compiled for.

    Returns:
        `cudnn_prefill_attention`, or `None` if attention over the KV cache is as fast.

    Example:
        >>> select_prefill_attention(jax.devices("cpu")[0]) is None
        True
    """
    return cudnn_prefill_attention if _has_cudnn(device) else None


def _has_cudnn(device):
    if device.platform != "gpu" or "cuda" not in device.client.platform_version:
        return False  # For example ROCm.
    return float(device.compute_capability) >= MIN_COMPUTE_CAPABILITY


def cudnn_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array,
    documents: jax.Array,
) -> jax.Array:
    """`causal_attention` by cuDNN's fused kernel, where there is one.

    There is none for float32, odd lengths and heads of more than `MAX_HEAD_DIM`; XLA
    computes attention then. Heads are padded to a multiple of 8, as required. The
    kernel without a mask is much faster, so the program contains both and selects one
    by the batch. The output at padding differs from `causal_attention`; nothing uses
    it.

    Args:
        query: See `causal_attention`.
        key: See `causal_attention`.
        value: See `causal_attention`.
        mask: See `causal_attention`.
        documents: Int array `(batch, length)`, see `select_attention`.

    Returns:
        Array `(batch, num_query_heads, length, head_dim)` with the dtype of `value`.
    """
    if not _cudnn_supports(query):
        return causal_attention(query, key, value, mask)
    scale = query.shape[-1] ** -0.5
    # Outside of the branches, which keep the layout of their arguments in memory.
    heads = _to_cudnn(query, key, value)
    needs_no_mask = is_causality_sufficient(documents)
    if isinstance(needs_no_mask, jax.core.Tracer):
        context = jax.lax.cond(
            needs_no_mask,
            lambda *heads: _cudnn_kernel(*heads, scale),
            lambda *heads: _cudnn_kernel(*heads, scale, mask),
            *heads,
        )
    else:  # Operation by operation, `cond` would compile in each call.
        context = _cudnn_kernel(*heads, scale, None if needs_no_mask else mask)
    return _from_cudnn(context, query)


def cudnn_prefill_attention(
    query: jax.Array, key: jax.Array, value: jax.Array
) -> jax.Array:
    """Causal attention without padding by cuDNN's fused kernel, where there is one.

    Args:
        query: See `causal_attention`.
        key: See `causal_attention`.
        value: See `causal_attention`.

    Returns:
        Array `(batch, num_query_heads, length, head_dim)` with the dtype of `value`.
    """
    if not _cudnn_supports(query):
        mask = causal_mask(jnp.arange(query.shape[2])[None])
        return causal_attention(query, key, value, mask)
    heads = _to_cudnn(query, key, value)
    return _from_cudnn(_cudnn_kernel(*heads, query.shape[-1] ** -0.5), query)


def is_causality_sufficient(documents: jax.Array) -> jax.Array:
    """Returns whether causal attention needs no further mask.

    That is so if each sequence has one document, and padding only after it: no real
    token attends to later positions anyway.

    Args:
        documents: Int array `(batch, length)`, see `select_attention`.

    Returns:
        Bool scalar.

    Example:
        >>> [
        ...     is_causality_sufficient(jnp.array([documents])).item()
        ...     for documents in ([1, 1, 1], [1, 1, 0], [0, 1, 1], [1, 1, 2])
        ... ]
        [True, True, False, False]
    """
    previous, following = documents[:, :-1], documents[:, 1:]
    return jnp.all((following == previous) | (following == 0))


def _cudnn_supports(query):
    _, _, length, head_dim = query.shape
    return query.dtype.itemsize <= 2 and length % 2 == 0 and head_dim <= MAX_HEAD_DIM


def _cudnn_kernel(query, key, value, scale, mask=None):
    return jax.nn.dot_product_attention(
        *(query, key, value),
        mask=mask,
        is_causal=True,  # Redundant with a mask, but skips the masked blocks.
        scale=scale,
        implementation="cudnn",
    )


def _to_cudnn(*heads):
    """`(batch, heads, length, head_dim)` to the kernel's order, with padded heads."""
    padding = (0, 0), (0, 0), (0, 0), (0, -heads[0].shape[-1] % 8)
    return [jnp.swapaxes(jnp.pad(x, padding), 1, 2) for x in heads]


def _from_cudnn(context, query):
    return jnp.swapaxes(context, 1, 2)[..., : query.shape[-1]]
