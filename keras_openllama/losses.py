"""The loss of training: the cross-entropy of the next token, without all its logits."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

# Ours: logits that are in memory at once, per device; 4 bytes each.
LOGITS_AT_ONCE = 16 << 20


class Sums(NamedTuple):
    """What a batch's targets add up to; float32 scalars.

    Attributes:
        loss: nats, each target by its weight.
        z: squares of the log of the softmax's denominator, by the same weights.
        correct: weights of the targets that have the largest logit.
    """

    loss: jax.Array
    z: jax.Array
    correct: jax.Array


def next_token_sums(hidden, kernel, targets, weights, z_scale=0.0, chunks=None):
    """Sums over the targets of a batch, a chunk of each row at a time.

    The logits of a chunk are turned into gradients while they are there, so that they
    are neither kept nor computed twice; all of that in float32.

    Args:
        hidden: `(batch, length, hidden_dim)`, hidden states after the final norm.
        kernel: `(vocabulary_size, hidden_dim)`, the head, in the dtype of `hidden`.
        targets: int `(batch, length)`.
        weights: float32 `(batch, length)`; 0 where there is nothing to predict.
        z_scale: float, weight of `z` in the gradient of `loss`: the gradient is that
            of `loss + z_scale * z` (the z-loss of PaLM, arXiv:2204.02311, section 5).
        chunks: int, into how many pieces a row is cut. Chosen by size if `None`.

    Returns:
        `Sums`; only `loss` carries a gradient.

    Source: chunks of the logits with gradients at once, as in Cut Your Losses
    (arXiv:2411.09009) and Liger Kernel (arXiv:2410.10989).
    """
    if chunks is None:
        chunks = _chunks(*targets.shape, kernel.shape[0])
    loss, z, correct = _fused(z_scale, chunks, hidden, kernel, targets, weights)
    return Sums(loss, z, correct)


def _chunks(batch, length, vocabulary_size):
    """The fewest chunks, a divisor of the length, whose logits are few enough."""
    most = max(1, LOGITS_AT_ONCE // (batch * vocabulary_size))
    return next(
        n for n in range(1, length + 1) if length % n == 0 and length <= n * most
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _fused(z_scale, chunks, hidden, kernel, targets, weights):
    def add(sums, chunk):
        return _plus(sums, _chunk_sums(kernel, *chunk)[0]), None

    parts = [_cut(x, chunks) for x in (hidden, targets, weights)]
    sums, _ = jax.lax.scan(add, _zeros(3), tuple(parts))
    return sums


def _forward(z_scale, chunks, hidden, kernel, targets, weights):
    def add(carry, chunk):
        sums, kernel_gradient = carry
        states, chunk_targets, chunk_weights = chunk
        new, (logits, normaliser) = _chunk_sums(kernel, *chunk)
        # d loss / d logits: softmax minus one-hot; z adds 2 z_scale log(Z) softmax.
        softmax = jnp.exp(logits - normaliser[..., None])
        slope = chunk_weights * (1 + 2 * z_scale * normaliser)
        columns = jax.lax.broadcasted_iota("int32", logits.shape, logits.ndim - 1)
        hit = columns == chunk_targets[..., None]
        gradient = softmax * slope[..., None] - jnp.where(
            hit, chunk_weights[..., None], 0
        )
        gradient = gradient.astype(states.dtype)
        states_gradient = _product("btv,vd->btd", gradient, kernel)
        kernel_gradient += _product("btv,btd->vd", gradient, states)
        return (_plus(sums, new), kernel_gradient), states_gradient

    parts = [_cut(x, chunks) for x in (hidden, targets, weights)]
    start = _zeros(3), jnp.zeros(kernel.shape, "float32")
    (sums, kernel_gradient), states_gradient = jax.lax.scan(add, start, tuple(parts))
    hidden_gradient = jnp.moveaxis(states_gradient, 0, 1).reshape(hidden.shape)
    return sums, (hidden_gradient.astype(hidden.dtype), kernel_gradient)


def _backward(z_scale, chunks, residuals, cotangents):
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


def _chunk_sums(kernel, hidden, targets, weights):
    logits = _product("btd,vd->btv", hidden, kernel)
    normaliser = jax.nn.logsumexp(logits, axis=-1)
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    largest = jnp.max(logits, axis=-1)
    sums = (
        jnp.sum((normaliser - chosen) * weights),
        jnp.sum(jnp.square(normaliser) * weights),
        jnp.sum(jnp.where(chosen >= largest, weights, 0)),
    )
    return sums, (logits, normaliser)


def _product(equation, a, b):
    return jnp.einsum(equation, a, b, preferred_element_type="float32")


def _cut(x, chunks):
    """`(batch, length, …)` to `(chunks, batch, length / chunks, …)`."""
    batch, length = x.shape[:2]
    x = x.reshape(batch, chunks, length // chunks, *x.shape[2:])
    return jnp.moveaxis(x, 1, 0)


def _plus(a, b):
    return tuple(x + y for x, y in zip(a, b, strict=True))


def _zeros(count):
    return tuple(jnp.zeros((), "float32") for _ in range(count))
