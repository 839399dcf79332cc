"""What each target of a batch weighs, in loss and metrics."""

from keras import ops


def target_weights(padding_mask, weights=None):
    """Weights as the steps of training take them; padding weighs nothing.

    Args:
        padding_mask: bool or int `(batch, length)`, 0 on padding.
        weights: `None`, or numbers `(batch,)` or `(batch, length)`.

    Returns:
        float32 tensor `(batch, length)`.
    """
    real = ops.cast(ops.cast(padding_mask, "bool"), "float32")
    if weights is None:
        return real
    weights = ops.cast(weights, "float32")
    return real * (weights[:, None] if len(weights.shape) == 1 else weights)
