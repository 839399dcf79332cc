"""What a step or an evaluation returns, on every backend."""

import math
from typing import Any, NamedTuple


class StepMetrics(NamedTuple):
    """The metrics of a training step; float32 scalars, except as said.

    Attributes:
        loss: nats per target, the mean by weight, z-loss not included.
        accuracy: share of the targets that have the largest logit.
        targets: sum of the weights of the targets.
        grad_norm: global norm of the gradient, before it is clipped. `None` where
            Keras computes the step.
        param_norm: global norm of the variables before the step, or `None` likewise.
        learning_rate: of this step.
        applied: bool; False where the step was skipped: a loss or gradient that is not
            finite, or a spike, never reaches a variable.
    """

    loss: Any
    accuracy: Any
    targets: Any
    grad_norm: Any
    param_norm: Any
    learning_rate: Any
    applied: Any


class LossSums(NamedTuple):
    """What a batch's targets add up to; float32 scalars.

    Attributes:
        loss: nats, each target by its weight.
        z: squares of the log of the softmax's denominator, by the same weights.
        correct: weights of the targets that have the largest logit.
    """

    loss: Any
    z: Any
    correct: Any


def perplexity_from_loss(loss):
    """The perplexity of a loss in nats per token; `inf` where `exp` overflows."""
    return math.inf if loss > 700 else math.exp(loss)
