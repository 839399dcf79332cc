"""The loss of training: the cross-entropy of the next token, without all its logits."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from keras_openllama.config import LOGITS_PER_CHUNK
from keras_openllama.distribution import BATCH_AXES
from keras_openllama.training.step_metrics import LossSums


def chunked_cross_entropy(
    hidden, kernel, targets, weights, z_scale=0.0, chunks=None, mesh=None
):
    """Sums over the targets of a batch, a chunk of each row at a time.

    The logits of a chunk are turned into gradients while they are there, so that they
    are neither kept nor computed twice; all of that in float32. On a mesh each device
    gathers its part of the vocabulary once, and the gradient of the head is reduced
    once, after the last chunk.

    Args:
        hidden: `(batch, length, hidden_dim)`, hidden states after the final norm.
        kernel: `(vocabulary_size, hidden_dim)`, the head, in the dtype of `hidden`.
        targets: int `(batch, length)`.
        weights: float32 `(batch, length)`; 0 where there is nothing to predict.
        z_scale: float, weight of `z` in the gradient of `loss`: the gradient is that
            of `loss + z_scale * z` (the z-loss of PaLM, arXiv:2204.02311, section 5).
        chunks: int, into how many pieces a row is cut. Chosen by size if `None`.
        mesh: `jax.sharding.Mesh` with the axes of `distribution.make_mesh`, over which
            the arguments are laid as `OpenLlamaParallel` lays them; `None` for one
            device.

    Returns:
        `LossSums`; only `loss` carries a gradient.

    Source: chunks of the logits with gradients at once, as in Cut Your Losses
    (arXiv:2411.09009) and Liger Kernel (arXiv:2410.10989).
    """
    return LossSums(*_fused(z_scale, chunks, mesh, hidden, kernel, targets, weights))


def _chunks(batch, length, vocabulary_size):
    """The fewest chunks, a divisor of the length, whose logits are few enough."""
    most = max(1, LOGITS_PER_CHUNK // (batch * vocabulary_size))
    return next(
        n for n in range(1, length + 1) if length % n == 0 and length <= n * most
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _fused(z_scale, chunks, mesh, hidden, kernel, targets, weights):
    def sums(hidden, kernel, targets, weights):
        parts = _cut(chunks, hidden, kernel, targets, weights)
        first = _first_column(mesh, kernel)

        def add(sums, chunk):
            return _plus(sums, _chunk_sums(mesh, first, kernel, *chunk)[0]), None

        sums, _ = jax.lax.scan(add, _zeros(3), parts)
        return _over_rows(mesh, sums)

    return _on_each_device(mesh, sums, (P(),) * 3)(hidden, kernel, targets, weights)


def _forward(z_scale, chunks, mesh, hidden, kernel, targets, weights):
    outputs = (P(),) * 3, (P(BATCH_AXES, None, None), P("model", "fsdp"))
    compute = functools.partial(_sums_and_gradients, z_scale, chunks, mesh)
    return _on_each_device(mesh, compute, outputs)(hidden, kernel, targets, weights)


def _sums_and_gradients(z_scale, chunks, mesh, hidden, kernel, targets, weights):
    """Of a device's rows and part of the vocabulary, reduced over the mesh."""
    first = _first_column(mesh, kernel)

    def add(carry, chunk):
        sums, kernel_gradient = carry
        states, chunk_targets, chunk_weights = chunk
        new, (logits, normaliser) = _chunk_sums(mesh, first, kernel, *chunk)
        # d loss / d logits: softmax minus one-hot; z adds 2 z_scale log(Z) softmax.
        softmax = jnp.exp(logits - normaliser[..., None])
        slope = chunk_weights * (1 + 2 * z_scale * normaliser)
        columns = jax.lax.broadcasted_iota("int32", logits.shape, logits.ndim - 1)
        hit = first + columns == chunk_targets[..., None]
        gradient = softmax * slope[..., None] - jnp.where(
            hit, chunk_weights[..., None], 0
        )
        gradient = gradient.astype(states.dtype)
        states_gradient = _product("btv,vd->btd", gradient, kernel)
        kernel_gradient += _product("btv,btd->vd", gradient, states)
        return (_plus(sums, new), kernel_gradient), states_gradient

    parts = _cut(chunks, hidden, kernel, targets, weights)
    start = _zeros(3), jnp.zeros(kernel.shape, "float32")
    (sums, kernel_gradient), states_gradient = jax.lax.scan(add, start, parts)
    hidden_gradient = jnp.moveaxis(states_gradient, 0, 1).reshape(hidden.shape)
    hidden_gradient = _over_model(mesh, jax.lax.psum, hidden_gradient)
    if mesh is not None:
        kernel_gradient = jax.lax.psum_scatter(
            kernel_gradient, "fsdp", scatter_dimension=1, tiled=True
        )
        kernel_gradient = jax.lax.psum(kernel_gradient, "data")
    gradients = hidden_gradient.astype(hidden.dtype), kernel_gradient
    return _over_rows(mesh, sums), gradients


def _backward(z_scale, chunks, mesh, residuals, cotangents):
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
    """The sums of a chunk; its logits and the log of their softmax's denominator.

    On a mesh `kernel` and the logits are a part of the vocabulary, from `first` on.
    """
    logits = _product("btd,vd->btv", hidden, kernel)
    largest = _over_model(mesh, jax.lax.pmax, jnp.max(logits, axis=-1))
    exponentials = jnp.sum(jnp.exp(logits - largest[..., None]), axis=-1)
    normaliser = largest + jnp.log(_over_model(mesh, jax.lax.psum, exponentials))
    columns = targets - first
    chosen = jnp.take_along_axis(logits, columns[..., None], axis=-1, mode="clip")
    here = (columns >= 0) & (columns < logits.shape[-1])
    chosen = jnp.where(here, chosen[..., 0], 0)
    chosen = _over_model(mesh, jax.lax.psum, chosen)
    sums = (
        jnp.sum((normaliser - chosen) * weights),
        jnp.sum(jnp.square(normaliser) * weights),
        jnp.sum(jnp.where(chosen >= largest, weights, 0)),
    )
    return sums, (logits, normaliser)


def _product(equation, a, b):
    return jnp.einsum(equation, a, b, preferred_element_type="float32")


def _cut(chunks, hidden, kernel, *rest):
    """Each of `(batch, length, …)` as `(chunks, batch, length / chunks, …)`."""
    batch, length = hidden.shape[:2]
    chunks = chunks or _chunks(batch, length, len(kernel))
    return tuple(
        jnp.moveaxis(x.reshape(batch, chunks, length // chunks, *x.shape[2:]), 1, 0)
        for x in (hidden, *rest)
    )


# ----- On a mesh


def _on_each_device(mesh, compute, outputs):
    """`compute` of each device's rows and part of the vocabulary."""
    if mesh is None:
        return compute
    rows = P(BATCH_AXES, None)
    inputs = P(BATCH_AXES, None, None), P("model", None), rows, rows
    return jax.shard_map(
        compute, mesh=mesh, in_specs=inputs, out_specs=outputs, check_vma=False
    )


def _first_column(mesh, kernel):
    """Number of the first token of a device's part of the vocabulary."""
    return 0 if mesh is None else jax.lax.axis_index("model") * len(kernel)


def _over_model(mesh, reduce, x):
    """What the parts of the vocabulary make together."""
    if mesh is None or mesh.shape["model"] == 1:
        return x
    return reduce(x, "model")


def _over_rows(mesh, sums):
    return sums if mesh is None else jax.lax.psum(sums, BATCH_AXES)


def _plus(a, b):
    return tuple(x + y for x, y in zip(a, b, strict=True))


def _zeros(count):
    return tuple(jnp.zeros((), "float32") for _ in range(count))
