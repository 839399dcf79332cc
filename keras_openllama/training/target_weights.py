"""The weight of each target in the loss and the metrics."""

from __future__ import annotations

from keras import ops

from keras_openllama.utils.types import Tensor


def no_targets_error(subject: str) -> ValueError:
    """Returns the error about data whose loss would be a mean over nothing.

    Args:
        subject: what has no targets, with its verb, such as "`x` has".

    Returns:
        The error, to be raised.

    Example:
        >>> str(no_targets_error("`x` has"))[:26]
        '`x` has no target tokens: '
    """
    return ValueError(
        f"{subject} no target tokens: the texts are empty, or prompts fill whole "
        "sequences, or all sample weights are zero. So there is no loss. Increase the "
        "sequence length (`preprocessor.sequence_length`, --sequence-length), or "
        "shorten the prompts."
    )


def target_weights(padding_mask: Tensor, weights: Tensor | None = None) -> Tensor:
    """Combines sample weights with the padding mask; padding has zero weight.

    Args:
        padding_mask: bool or int `(batch, length)`, 0 on padding.
        weights: sample weights `(batch,)` or `(batch, length)`, or `None`.

    Returns:
        float32 `(batch, length)`.

    Example:
        >>> import numpy as np
        >>> target_weights(np.array([[1, 1, 0]]), np.array([0.5]))
        Array([[0.5, 0.5, 0. ]], dtype=float32)
    """
    real = ops.cast(ops.cast(padding_mask, "bool"), "float32")
    if weights is None:
        return real
    weights = ops.cast(weights, "float32")
    return real * (weights[:, None] if len(weights.shape) == 1 else weights)
