"""What of a layer is kept for the backward pass, and what is computed again."""

import keras

if keras.config.backend() == "jax":
    import jax

# From the one that keeps most to the one that keeps least. Beside its input a layer
# keeps for the backward pass:
POLICIES = {
    "none": "whatever the backward pass needs",
    "products": "query, key, value, attention, the states after it, gate and up",
    "projections": "query, key, value, attention and the states after it",
    "full": "nothing",
}


def check_policy(policy):
    """Raises a `ValueError` for what is no policy, or cannot be had here."""
    if policy not in POLICIES:
        raise ValueError(
            f"`rematerialize` takes one of {', '.join(POLICIES)}. Received: {policy!r}"
        )
    if policy != "none" and keras.config.backend() != "jax":
        raise ValueError(
            f"rematerialize={policy!r} needs the JAX backend (KERAS_BACKEND=jax). "
            f"Received: backend={keras.config.backend()!r}"
        )


def rematerialized(policy, block, *policies, in_scan=False):
    """A block of a layer that keeps its inputs only, under some policies.

    Args:
        policy: string, one of `POLICIES`.
        block: callable of tensors.
        policies: strings, those under which the block is computed again.
        in_scan: bool, whether it runs in a `layer_scan.scan_layers`, which keeps XLA
            from finding out that something is computed twice. Elsewhere it has to be
            kept from that, at some cost.

    Returns:
        A callable with the same arguments.

    Source: sublinear memory cost (arXiv:1604.06174); `jax.checkpoint`.
    """
    if policy not in policies:
        return block
    return jax.checkpoint(lambda *arguments: block(*arguments), prevent_cse=not in_scan)
