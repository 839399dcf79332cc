"""Causal attention of training on CPUs by the package's C function, with JAX."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import jax
import jax.numpy as jnp

from keras_openllama.native.library import (
    NATIVE,
    SOURCES,
    compile_sources,
    if_it_compiles,
)

_FORWARD, _BACKWARD = (
    f"keras_openllama_causal_attention_{name}" for name in ("forward", "backward")
)


def is_compiled() -> bool:
    """Returns whether `compiled_causal_attention` can be used in this process.

    It is for processes with one device, a CPU: XLA does not partition the function.
    Where it can be compiled, it is registered with XLA.

    Example:
        >>> is_compiled() in (True, False)
        True
    """
    has_one_cpu = jax.default_backend() == "cpu" and jax.device_count() == 1
    return has_one_cpu and _register()


@functools.cache
def _register():
    path = if_it_compiles(functools.partial(_compile, NATIVE))
    if path is None:
        return False
    library = ctypes.CDLL(str(path))
    for name, function in (
        (_FORWARD, library.xla_causal_attention_forward),
        (_BACKWARD, library.xla_causal_attention_backward),
    ):
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(function), platform="cpu")
    return True


def _compile(options):
    # The header of the installed JAX, whose version it must be.
    include = Path(jax.ffi.include_dir())
    names = "causal_attention.c", "worker_threads.c", "xla/attention_handlers.c"
    sources = [
        *(SOURCES / name for name in names),
        *sorted(SOURCES.glob("*.h")),
        include / "xla/ffi/api/c_api.h",
    ]
    return compile_sources("attention-of-xla", sources, (*options, f"-I{include}"))


def compiled_causal_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array
) -> jax.Array:
    """`attention.causal_attention` on a CPU by the C function, in float32.

    `is_compiled` must have returned True. The backward pass recomputes the attention
    weights from a sum per query.

    Args:
        query: float `(batch, num_query_heads, length, head_dim)`.
        key: float `(batch, num_key_value_heads, length, head_dim)`.
        value: float, of the shape of `key`.
        mask: bool `(batch or 1, 1, length, length)`, False for every later position.

    Returns:
        Array of the shape of `query` with the dtype of `value`. Queries that may attend
        to no key are 0.

    Example:
        >>> x, mask = jnp.ones((2, 4, 6, 8)), jnp.tril(jnp.ones((1, 1, 6, 6), bool))
        >>> if is_compiled():
        ...     context = compiled_causal_attention(x, x, x, mask)
    """
    length = query.shape[2]
    mask = jnp.broadcast_to(mask, (*mask.shape[:2], length, length))
    # In the order of axes in which projections read and write.
    return jnp.swapaxes(_attend(query, key, jnp.swapaxes(value, 1, 2), mask), 1, 2)


@jax.custom_vjp
def _attend(query, key, value, mask):
    """Of values `(batch, length, heads, head_dim)` to the output in this order."""
    return _forward(query, key, value, mask)[0]


def _forward(query, key, value, mask):
    batch, heads, length, head_dim = query.shape
    call = jax.ffi.ffi_call(
        _FORWARD,
        (
            jax.ShapeDtypeStruct((batch, length, heads, head_dim), "float32"),
            jax.ShapeDtypeStruct((batch, heads, length), "float32"),
        ),
        vmap_method="sequential",
    )
    output, log_sums = call(*_in_float32(query, key, value), mask)
    output = output.astype(value.dtype)
    return output, (query, key, value, mask, output, log_sums)


def _backward(saved, gradient):
    query, key, value, mask, output, log_sums = saved
    call = jax.ffi.ffi_call(
        _BACKWARD,
        [jax.ShapeDtypeStruct(x.shape, "float32") for x in (query, key, value)],
        vmap_method="sequential",
    )
    output, gradient = _in_float32(output, gradient)
    tensors = _in_float32(query, key, value)
    gradients = call(*tensors, mask, output, log_sums, gradient)
    gradients = (
        x.astype(y.dtype) for x, y in zip(gradients, (query, key, value), strict=True)
    )
    return *gradients, None


_attend.defvjp(_forward, _backward)


def _in_float32(*tensors):
    """Converted in each pass: saved tensors stay in their dtype."""
    return [x.astype("float32") for x in tensors]
