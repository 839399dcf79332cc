"""The training loss: next-token cross-entropy that never holds all logits at once."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from keras_openllama.config import LOGITS_PER_CHUNK
from keras_openllama.distribution import BATCH_AXES
from keras_openllama.training.step_metrics import LossSums


def chunked_cross_entropy(
    hidden: jax.Array,
    kernel: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    z_loss: float = 0.0,
    num_chunks: int | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> LossSums:
    """Computes the cross-entropy of logits `hidden @ kernel.T`, chunk by chunk.

    The gradients of a chunk are computed together with its logits, so that logits are
    neither saved nor recomputed. All of this is in float32. On a mesh, each device
    gathers its shard of the vocabulary once, and the gradient of the kernel is reduced
    once, after the last chunk.

    Args:
        hidden: hidden states after the final norm, `(batch, length, hidden_dim)`.
        kernel: kernel of the head, `(vocabulary_size, hidden_dim)`, in the dtype of
            `hidden`.
        targets: int `(batch, length)`.
        weights: float32 `(batch, length)`; targets with zero weight are ignored.
        z_loss: weight of `z` in the gradient of `loss`, which is the gradient of
            `loss + z_loss * z` (the z-loss of PaLM, arXiv:2204.02311, section 5).
        num_chunks: number of chunks of the sequences, a divisor of `length`; by default
            the fewest whose logits fit `config.LOGITS_PER_CHUNK`.
        mesh: mesh with the axes of `distribution.make_mesh`, over which the arguments
            are sharded as by `OpenLlamaParallel`; `None` for one device.

    Returns:
        Weighted sums over the targets. Only `loss` has a gradient.

    Example:
        >>> hidden, kernel = jnp.ones((1, 2, 4)), jnp.zeros((8, 4))
        >>> targets, weights = jnp.array([[3, 5]]), jnp.array([[1.0, 0.0]])
        >>> chunked_cross_entropy(hidden, kernel, targets, weights).loss  # log(8)
        Array(2.0794415, dtype=float32)

    Source: logits in chunks with immediate gradients, as in Cut Your Losses
    (arXiv:2411.09009) and Liger Kernel (arXiv:2410.10989).
    """
    return LossSums(*_fused(z_loss, num_chunks, mesh, hidden, kernel, targets, weights))


def chunked_cross_entropy_of_head(
    head: Callable[[jax.Array], jax.Array],
    hidden: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    z_loss: float = 0.0,
    num_chunks: int | None = None,
) -> LossSums:
    """Computes `chunked_cross_entropy` of the logits of a layer, as of a quantized one.

    The backward pass recomputes the logits of a chunk. On a mesh, XLA partitions it.

    Args:
        head: layer or function `(batch, length, hidden_dim)` to logits
            `(batch, length, vocabulary_size)`.
        hidden: see `chunked_cross_entropy`.
        targets: see `chunked_cross_entropy`.
        weights: see `chunked_cross_entropy`.
        z_loss: see `chunked_cross_entropy`.
        num_chunks: see `chunked_cross_entropy`.

    Returns:
        Weighted sums over the targets. Only `loss` has a gradient.

    Example:
        >>> hidden, head = jnp.ones((1, 2, 4)), lambda x: jnp.zeros((*x.shape[:2], 8))
        >>> targets, weights = jnp.array([[3, 5]]), jnp.array([[1.0, 0.0]])
        >>> chunked_cross_entropy_of_head(head, hidden, targets, weights).loss  # log(8)
        Array(2.0794415, dtype=float32)
    """

    @jax.checkpoint
    def chunk_sums(states, targets, weights):
        logits = head(states).astype("float32")
        log_normalizer = jax.nn.logsumexp(logits, axis=-1)
        chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        z = jnp.sum(jnp.square(log_normalizer) * weights)
        loss = jnp.sum((log_normalizer - chosen) * weights)
        loss += z_loss * (z - jax.lax.stop_gradient(z))  # In the gradient only.
        correct = jnp.sum(jnp.where(chosen >= jnp.max(logits, axis=-1), weights, 0))
        return loss, *jax.lax.stop_gradient((z, correct))

    def add(sums, chunk):
        return _add(sums, chunk_sums(*chunk)), None

    vocabulary_size = jax.eval_shape(head, hidden).shape[-1]
    parts = _split(num_chunks, vocabulary_size, hidden, targets, weights)
    sums, _ = jax.lax.scan(add, _zeros(3), parts)
    return LossSums(*sums)


def _choose_num_chunks(batch, length, vocabulary_size):
    """Returns the smallest divisor of the length whose chunks of logits fit."""
    most = max(1, LOGITS_PER_CHUNK // (batch * vocabulary_size))
    return next(
        n for n in range(1, length + 1) if length % n == 0 and length <= n * most
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _fused(z_loss, num_chunks, mesh, hidden, kernel, targets, weights):
    def sums(hidden, kernel, targets, weights):
        parts = _split(num_chunks, len(kernel), hidden, targets, weights)
        first = _first_token(mesh, kernel)

        def add(sums, chunk):
            return _add(sums, _chunk_sums(mesh, first, kernel, *chunk)[0]), None

        sums, _ = jax.lax.scan(add, _zeros(3), parts)
        return _reduce_over_batch(mesh, sums)

    return _shard_map(mesh, sums, (P(),) * 3)(hidden, kernel, targets, weights)


def _forward(z_loss, num_chunks, mesh, hidden, kernel, targets, weights):
    outputs = (P(),) * 3, (P(BATCH_AXES, None, None), P("model", "fsdp"))
    compute = functools.partial(_sums_and_gradients, z_loss, num_chunks, mesh)
    return _shard_map(mesh, compute, outputs)(hidden, kernel, targets, weights)


def _sums_and_gradients(z_loss, num_chunks, mesh, hidden, kernel, targets, weights):
    """Computes a device's sums and gradients, reduced over the mesh."""
    first = _first_token(mesh, kernel)

    def add(carry, chunk):
        sums, kernel_gradient = carry
        states, chunk_targets, chunk_weights = chunk
        new, (logits, log_normalizer) = _chunk_sums(mesh, first, kernel, *chunk)
        # d loss / d logits: softmax minus one-hot; z adds 2 z_loss log(Z) softmax.
        softmax = jnp.exp(logits - log_normalizer[..., None])
        slope = chunk_weights * (1 + 2 * z_loss * log_normalizer)
        columns = jax.lax.broadcasted_iota("int32", logits.shape, logits.ndim - 1)
        hit = first + columns == chunk_targets[..., None]
        gradient = softmax * slope[..., None] - jnp.where(
            hit, chunk_weights[..., None], 0
        )
        gradient = gradient.astype(states.dtype)
        states_gradient = _einsum_float32("btv,vd->btd", gradient, kernel)
        # Of matrices: with more axes, XLA on a CPU would write a transposed copy.
        kernel_gradient += _einsum_float32(
            "rv,rd->vd", _flatten(gradient), _flatten(states)
        )
        return (_add(sums, new), kernel_gradient), states_gradient

    parts = _split(num_chunks, len(kernel), hidden, targets, weights)
    start = _zeros(3), jnp.zeros(kernel.shape, "float32")
    (sums, kernel_gradient), states_gradient = jax.lax.scan(add, start, parts)
    hidden_gradient = jnp.moveaxis(states_gradient, 0, 1).reshape(hidden.shape)
    hidden_gradient = _reduce_over_vocabulary(mesh, jax.lax.psum, hidden_gradient)
    if mesh is not None:
        kernel_gradient = jax.lax.psum_scatter(
            kernel_gradient, "fsdp", scatter_dimension=1, tiled=True
        )
        kernel_gradient = jax.lax.psum(kernel_gradient, "data")
    gradients = hidden_gradient.astype(hidden.dtype), kernel_gradient
    if mesh is not None:
        # Reduce now: the unreduced gradient would stay in memory for the layers'.
        gradients = jax.lax.optimization_barrier(gradients)
    return _reduce_over_batch(mesh, sums), gradients


def _backward(z_loss, num_chunks, mesh, residuals, cotangents):
    hidden_gradient, kernel_gradient = residuals
    scale = cotangents[0]  # Of `loss` alone.
    dtype = hidden_gradient.dtype
    return (
        (hidden_gradient * scale).astype(dtype),
        (kernel_gradient * scale).astype(dtype),
        None,
        None,
    )


_fused.defvjp(_forward, _backward)


def _chunk_sums(mesh, first, kernel, hidden, targets, weights):
    """Returns the sums of a chunk, its logits and their log-normalizer.

    On a mesh, `kernel` and the logits are a shard of the vocabulary that begins at
    token `first`.
    """
    logits = _einsum_float32("btd,vd->btv", hidden, kernel)
    largest = _reduce_over_vocabulary(mesh, jax.lax.pmax, jnp.max(logits, axis=-1))
    exponentials = jnp.sum(jnp.exp(logits - largest[..., None]), axis=-1)
    log_normalizer = largest + jnp.log(
        _reduce_over_vocabulary(mesh, jax.lax.psum, exponentials)
    )
    columns = targets - first
    chosen = jnp.take_along_axis(logits, columns[..., None], axis=-1, mode="clip")
    here = (columns >= 0) & (columns < logits.shape[-1])
    chosen = jnp.where(here, chosen[..., 0], 0)
    chosen = _reduce_over_vocabulary(mesh, jax.lax.psum, chosen)
    sums = (
        jnp.sum((log_normalizer - chosen) * weights),
        jnp.sum(jnp.square(log_normalizer) * weights),
        jnp.sum(jnp.where(chosen >= largest, weights, 0)),
    )
    return sums, (logits, log_normalizer)


def _einsum_float32(equation, a, b):
    return jnp.einsum(equation, a, b, preferred_element_type="float32")


def _flatten(x):
    return x.reshape(-1, x.shape[-1])


def _split(num_chunks, vocabulary_size, *arrays):
    """Splits `(batch, length, …)` to `(num_chunks, batch, length / num_chunks, …)`."""
    batch, length = arrays[0].shape[:2]
    num_chunks = num_chunks or _choose_num_chunks(batch, length, vocabulary_size)
    return tuple(
        jnp.moveaxis(
            x.reshape(batch, num_chunks, length // num_chunks, *x.shape[2:]), 1, 0
        )
        for x in arrays
    )


# ----- On a mesh


def _shard_map(mesh, compute, outputs):
    """Runs `compute` on each device's shard of the batch and the vocabulary."""
    if mesh is None:
        return compute
    batch_spec = P(BATCH_AXES, None)
    inputs = P(BATCH_AXES, None, None), P("model", None), batch_spec, batch_spec
    return jax.shard_map(
        compute, mesh=mesh, in_specs=inputs, out_specs=outputs, check_vma=False
    )


def _first_token(mesh, kernel):
    """Returns the first token of a device's shard of the vocabulary."""
    return 0 if mesh is None else jax.lax.axis_index("model") * len(kernel)


def _reduce_over_vocabulary(mesh, reduce, x):
    """Reduces over the shards of the vocabulary."""
    if mesh is None or mesh.shape["model"] == 1:
        return x
    return reduce(x, "model")


def _reduce_over_batch(mesh, sums):
    return sums if mesh is None else jax.lax.psum(sums, BATCH_AXES)


def _add(a, b):
    return tuple(x + y for x, y in zip(a, b, strict=True))


def _zeros(count):
    return tuple(jnp.zeros((), "float32") for _ in range(count))
