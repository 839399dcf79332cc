"""Rematerialization (gradient checkpointing) of the parts of a layer."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import keras

from keras_openllama.config import REMATERIALIZATION

if keras.config.backend() == "jax":
    import jax


def check_policy(policy: str) -> None:
    """Checks a rematerialization policy.

    Args:
        policy: A policy of `config.REMATERIALIZATION`.

    Raises:
        ValueError: If the policy is unknown, or the backend does not support it.
    """
    if policy not in REMATERIALIZATION:
        raise ValueError(
            f"`rematerialize` must be one of {', '.join(REMATERIALIZATION)}. Received: "
            f"{policy!r}"
        )
    if policy != "none" and keras.config.backend() != "jax":
        raise ValueError(
            f"rematerialize={policy!r} needs the JAX backend (KERAS_BACKEND=jax). "
            f"Received: backend={keras.config.backend()!r}"
        )


def maybe_rematerialize(
    block: Callable[..., Any],
    policy: str,
    if_policy: str | tuple[str, ...],
    in_scan: bool = False,
) -> Callable[..., Any]:
    """Rematerializes a block of a layer if the policy in use says so.

    A rematerialized block saves only its inputs for the backward pass, which recomputes
    the rest.

    Args:
        block: Callable of tensors.
        policy: The policy in use, one of `config.REMATERIALIZATION`.
        if_policy: The policy, or the policies, that rematerialize this block.
        in_scan: Whether the block runs in `scan.scan_layers`, where a layer is
            recomputed only when its gradient is available.

    Returns:
        A callable with the same arguments: `block` itself under other policies.

    Example:
        >>> maybe_rematerialize(abs, policy="none", if_policy="full") is abs
        True

    Source: sublinear memory cost (arXiv:1604.06174); `jax.checkpoint`.
    """
    if policy not in ((if_policy,) if isinstance(if_policy, str) else if_policy):
        return block
    if in_scan:
        return jax.checkpoint(lambda *arguments: block(*arguments), prevent_cse=False)
    return recompute_in_backward(block)


def recompute_in_backward(block: Callable[..., Any]) -> Callable[..., Any]:
    """Rematerializes a block: only its arguments are saved for the backward pass (JAX).

    `jax.checkpoint` relies on optimization barriers, which XLA drops on CPUs. There XLA
    eliminates the second computation as a common subexpression, or recomputes all
    layers before the first one is needed. This function makes the recomputation depend
    on the gradient.

    Args:
        block: Callable of tensors. It may close over other tensors, such as weights.

    Returns:
        A callable with the same arguments.

    Example:
        >>> square = recompute_in_backward(lambda x: x * x)
        >>> jax.grad(square)(3.0).item()
        6.0
    """

    def rematerialized(*arguments):
        # A new function each time: JAX caches by function which constants it uses.
        converted, constants = jax.closure_convert(
            lambda *arguments: block(*arguments), *arguments
        )

        def compute(arguments, constants):
            return converted(*arguments, *constants)

        recomputed = jax.custom_vjp(compute)
        recomputed.defvjp(
            lambda *inputs: (compute(*inputs), inputs),
            functools.partial(_backward, compute),
        )
        return recomputed(arguments, tuple(constants))

    return rematerialized


def _backward(compute, inputs, gradients):
    """Gradients of arguments and constants. Constants are weights, always in memory."""
    arguments, constants = inputs
    arguments = jax.lax.platform_dependent(
        arguments,
        gradients,
        cpu=_wait_for,
        default=lambda *both: jax.lax.optimization_barrier(both)[0],
    )
    return jax.vjp(compute, arguments, constants)[1](gradients)


def _wait_for(arguments, gradients):
    """Returns the arguments, made to depend on the gradients.

    Adds 0 times a gradient. XLA may not simplify that to 0, since the gradient could be
    infinite or NaN. If it is, the gradients of the weights are not finite anyway, and
    the step is skipped. Otherwise the sum equals the arguments.
    """
    gradient = jax.tree.leaves(gradients)[0]
    zero = 0 * gradient[(slice(1),) * gradient.ndim].reshape(())

    def add_zero(x):
        is_float = keras.backend.is_float_dtype(x.dtype)
        return x + zero.astype(x.dtype) if is_float else x

    return jax.tree.map(add_zero, arguments)
