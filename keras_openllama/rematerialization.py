"""What of a layer is kept for the backward pass, and what is computed again."""

import keras

if keras.config.backend() == "jax":
    import jax
    from jax.ad_checkpoint import checkpoint_name

# What is kept of each layer beside its input, by policy.
POLICIES = {
    "none": None,  # Everything.
    "full": (),
    "projections": ("query", "key", "value", "attention", "output"),
}


def named(x, name):
    """Gives a tensor a name by which a policy can keep it."""
    return checkpoint_name(x, name) if keras.config.backend() == "jax" else x


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


def rematerialized(layer, policy):
    """A layer that keeps less in the forward pass of training.

    Args:
        layer: callable of tensors.
        policy: string: `"none"` keeps everything, `"full"` nothing but the layer's
            inputs, `"projections"` query, key, value, attention and its output.

    Returns:
        A callable with the same arguments.

    Raises:
        ValueError: see `check_policy`.

    Source: sublinear memory cost (arXiv:1604.06174); `jax.checkpoint`.
    """
    check_policy(policy)
    names = POLICIES[policy]
    if names is None:
        return layer
    keep = jax.checkpoint_policies.save_only_these_names(*names)
    return jax.checkpoint(lambda *arguments: layer(*arguments), policy=keep)
