"""The results of a training step and of an evaluation, on every backend."""

from __future__ import annotations

import math
from typing import NamedTuple

from keras_openllama.utils.types import Tensor


class StepMetrics(NamedTuple):
    """The metrics of a training step: float32 scalars, unless stated otherwise.

    Attributes:
        loss: mean loss in nats per target, weighted, without the z-loss.
        accuracy: fraction of the targets that have the largest logit, weighted.
        targets: sum of the weights of the targets.
        grad_norm: global norm of the gradient before clipping; `None` if Keras
            computes the step.
        param_norm: global norm of the trainable variables before the step; `None` if
            Keras computes the step.
        learning_rate: learning rate of the step.
        applied: bool, False if the step was skipped: a loss or gradient that is not
            finite, or a loss spike, changes no variable.
    """

    loss: Tensor
    accuracy: Tensor
    targets: Tensor
    grad_norm: Tensor | None
    param_norm: Tensor | None
    learning_rate: Tensor
    applied: Tensor


class LossSums(NamedTuple):
    """Weighted sums over the targets of a batch: float32 scalars.

    Attributes:
        loss: sum of the cross-entropy, in nats.
        z: sum of the squared logarithm of the softmax's denominator.
        correct: sum of the weights of the targets that have the largest logit.
    """

    loss: Tensor
    z: Tensor
    correct: Tensor


def perplexity_from_loss(loss: float) -> float:
    """Returns the perplexity of a loss.

    Args:
        loss: mean cross-entropy, in nats per token.

    Returns:
        `exp(loss)`, or `inf` where it would overflow.

    Example:
        >>> perplexity_from_loss(0.0), perplexity_from_loss(1000.0)
        (1.0, inf)
    """
    return math.inf if loss > 700 else math.exp(loss)
