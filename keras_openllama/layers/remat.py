"""What of a layer is kept for the backward pass, and what is computed again."""

import functools

import keras

from keras_openllama.config import REMATERIALIZATION

if keras.config.backend() == "jax":
    import jax


def check_policy(policy):
    """Raises a `ValueError` for what is no policy, or cannot be had here."""
    if policy not in REMATERIALIZATION:
        raise ValueError(
            f"`rematerialize` takes one of {', '.join(REMATERIALIZATION)}. Received: "
            f"{policy!r}"
        )
    if policy != "none" and keras.config.backend() != "jax":
        raise ValueError(
            f"rematerialize={policy!r} needs the JAX backend (KERAS_BACKEND=jax). "
            f"Received: backend={keras.config.backend()!r}"
        )


def rematerialized(policy, block, *policies, in_scan=False):
    """A block of a layer that keeps its inputs only, under some policies.

    Args:
        policy: string, one of `REMATERIALIZATION`.
        block: callable of tensors.
        policies: strings, those under which the block is computed again.
        in_scan: bool, whether it runs in a `scan.scan_layers`, which computes a
            layer again when its gradient is there, and not before.

    Returns:
        A callable with the same arguments.

    Source: sublinear memory cost (arXiv:1604.06174); `jax.checkpoint`.
    """
    if policy not in policies:
        return block
    if in_scan:
        return jax.checkpoint(lambda *arguments: block(*arguments), prevent_cse=False)
    return computed_again(block)


def computed_again(block):
    """A block of which a backward pass keeps the arguments only (JAX).

    `jax.checkpoint` asks XLA for it by barriers, and XLA drops them on CPUs: there it
    finds out that something is computed twice, or computes it again for all layers
    before the first one needs it. Here what is computed again depends on the gradient.

    Args:
        block: callable of tensors; it may use others, such as weights, too.

    Returns:
        A callable with the same arguments.
    """

    def through(*arguments):
        # A new function each time: JAX would remember what an old one had used.
        converted, constants = jax.closure_convert(
            lambda *arguments: block(*arguments), *arguments
        )

        def compute(arguments, constants):
            return converted(*arguments, *constants)

        again = jax.custom_vjp(compute)
        again.defvjp(
            lambda *inputs: (compute(*inputs), inputs),
            functools.partial(_backward, compute),
        )
        return again(arguments, tuple(constants))

    return through


def _backward(compute, inputs, gradients):
    """Gradients of arguments and constants; weights are there anyway, and no matter."""
    arguments, constants = inputs
    arguments = jax.lax.platform_dependent(
        arguments,
        gradients,
        cpu=_with_nothing_of,
        default=lambda *both: jax.lax.optimization_barrier(both)[0],
    )
    return jax.vjp(compute, arguments, constants)[1](gradients)


def _with_nothing_of(arguments, gradients):
    """The arguments, but not before there are gradients.

    XLA may not drop a product of 0 and a float, which could be infinite. Where it is,
    or no number, the gradients of the weights are not finite anyway, and the step is
    left out; to what is finite nothing is added.
    """
    gradient = jax.tree.leaves(gradients)[0]
    nothing = 0 * gradient[(slice(1),) * gradient.ndim].reshape(())

    def with_nothing(x):
        is_float = keras.backend.is_float_dtype(x.dtype)
        return x + nothing.astype(x.dtype) if is_float else x

    return jax.tree.map(with_nothing, arguments)
