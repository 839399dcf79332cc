"""Whether an optimizer scales the loss, so that gradients in float16 do not underflow.

With the policy `mixed_float16`, Keras wraps the optimizer that is given to `compile` in
a `keras.optimizers.LossScaleOptimizer`. It halves its scale after a gradient that is
not finite, and skips that step.
"""

from __future__ import annotations

import keras


def has_dynamic_loss_scale(optimizer: keras.optimizers.Optimizer) -> bool:
    """Returns whether the optimizer adapts its scale to gradients that overflow.

    Args:
        optimizer: the optimizer of a compiled model.

    Example:
        >>> has_dynamic_loss_scale(keras.optimizers.SGD(loss_scale_factor=2.0))
        False
    """
    return isinstance(optimizer, keras.optimizers.LossScaleOptimizer)


def scales_loss(optimizer: keras.optimizers.Optimizer) -> bool:
    """Returns whether gradients are those of `optimizer.scale_loss(loss)`.

    Args:
        optimizer: the optimizer of a compiled model.

    Example:
        >>> scales_loss(keras.optimizers.SGD(loss_scale_factor=2.0))
        True
    """
    return has_dynamic_loss_scale(optimizer) or optimizer.loss_scale_factor is not None
