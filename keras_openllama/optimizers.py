"""AdamW with LLaMA's settings and learning-rate schedule; Muon for small models."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from keras_openllama.backend.keras_private import adam_moments, in_stateless_scope
from keras_openllama.utils.types import Tensor

if keras.config.backend() == "tensorflow":
    import tensorflow
elif keras.config.backend() == "torch":
    import torch
    from torch.optim.adamw import adamw


@keras.saving.register_keras_serializable(package="keras_openllama")
class AdamW(keras.optimizers.AdamW):
    """AdamW with LLaMA's settings, and epsilon as in PyTorch and optax.

    Keras adds epsilon before the bias correction of the second moment, so that its
    effect in the first steps is several times as large.

    Args:
        learning_rate: float, or a `keras.optimizers.schedules.LearningRateSchedule`.
        weight_decay: float, decoupled weight decay of all variables, norms included, as
            in EasyLM.
        beta_1: float, decay of the first moment.
        beta_2: float, decay of the second moment.
        epsilon: float, added to the square root of the second moment.
        global_clipnorm: float, gradients are scaled down to this global norm.
        name: string, name of the optimizer.
        **kwargs: see `keras.optimizers.AdamW`.

    Example:
        >>> schedule = WarmupCosine(3e-4, final=3e-5, warmup_steps=2000, steps=250_000)
        >>> lm.compile(optimizer=AdamW(schedule))

    Sources: arXiv:1711.05101; settings, LLaMA (arXiv:2302.13971), section 2.3.
    """

    def __init__(
        self,
        learning_rate: float | keras.optimizers.schedules.LearningRateSchedule = 3e-4,
        weight_decay: float | None = 0.1,
        beta_1: float = 0.9,
        beta_2: float = 0.95,
        epsilon: float = 1e-8,
        global_clipnorm: float | None = 1.0,
        name: str = "adamw",
        **kwargs: Any,
    ) -> None:
        super().__init__(
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            beta_1=beta_1,
            beta_2=beta_2,
            epsilon=epsilon,
            global_clipnorm=global_clipnorm,
            name=name,
            **kwargs,
        )

    def apply(
        self,
        grads: Sequence[Tensor | None],
        trainable_variables: Sequence[keras.Variable] | None = None,
    ) -> None:
        """Updates the variables, with dense gradients on TensorFlow."""
        if keras.config.backend() == "tensorflow":
            # TensorFlow's gradient of embeddings has one entry per position. Keras
            # would compute the norm and the squares of these entries instead of their
            # sums by token.
            grads = [g if g is None else tensorflow.convert_to_tensor(g) for g in grads]
        return super().apply(grads, trainable_variables)

    def update_step(
        self, gradient: Tensor, variable: keras.Variable, learning_rate: Tensor
    ) -> None:
        """Updates one variable and its moments."""
        first, second, largest = moments = adam_moments(self, variable)
        gradient = ops.cast(gradient, variable.dtype)
        if keras.config.backend() == "torch" and not in_stateless_scope():
            columns = [[] if m is None else [m.value] for m in (variable, *moments)]
            tensors = [gradient, *itertools.chain(*columns)]
            # The fused kernel reads memory in order, and writes in place.
            if all(x.is_contiguous() for x in tensors):
                self._update_fused(gradient, columns, learning_rate)
                return
        step = ops.cast(self.iterations + 1, variable.dtype)
        # 1 - beta ** step, without cancellation in float32.
        first_bias = -ops.expm1(step * math.log(self.beta_1)) if self.beta_1 else 1.0
        second_bias = -ops.expm1(step * math.log(self.beta_2)) if self.beta_2 else 1.0
        self.assign_add(first, (gradient - first) * (1 - self.beta_1))
        self.assign_add(second, (ops.square(gradient) - second) * (1 - self.beta_2))
        if self.amsgrad:
            self.assign(largest, ops.maximum(largest, second))
            second = largest
        scale = ops.cast(learning_rate, variable.dtype) / first_bias
        denominator = ops.sqrt(second / second_bias) + self.epsilon
        self.assign_sub(variable, scale * first / denominator)

    def _update_fused(self, gradient, columns, learning_rate):
        """Updates a variable on PyTorch in a single pass over the memory.

        Args:
            gradient: tensor.
            columns: lists of the variable's tensor and of those of its moments.
            learning_rate: scalar tensor.
        """
        variable, first, second, largest = columns
        # A copy: `adamw` counts the step itself.
        steps = [ops.convert_to_tensor(self.iterations).to(torch.float32, copy=True)]
        with torch.no_grad():
            adamw(
                variable,
                [gradient],
                first,
                second,
                largest,
                steps,
                fused=True,
                amsgrad=self.amsgrad,
                beta1=self.beta_1,
                beta2=self.beta_2,
                lr=ops.cast(learning_rate, "float32"),
                weight_decay=0.0,  # Keras has applied it.
                eps=self.epsilon,
                maximize=False,
            )


@keras.saving.register_keras_serializable(package="keras_openllama")
class WarmupCosine(keras.optimizers.schedules.LearningRateSchedule):
    """Learning-rate schedule with linear warmup and cosine decay.

    Args:
        peak: float, learning rate at the end of the warmup.
        final: float, learning rate of the last step and of all later steps.
        warmup_steps: int, steps of the warmup. The first step has the learning rate
            `peak / warmup_steps`.
        steps: int, steps of the whole schedule.

    Raises:
        ValueError: if `final` is not in [0, `peak`], or `warmup_steps` not in
            [0, `steps`).

    Example:
        >>> schedule = WarmupCosine(3e-4, final=3e-5, warmup_steps=2000, steps=250_000)
        >>> f"{schedule(1999):.1e}"
        '3.0e-04'

    Source: LLaMA (arXiv:2302.13971), section 2.3.
    """

    def __init__(
        self, peak: float, final: float, warmup_steps: int, steps: int
    ) -> None:
        if not 0 <= final <= peak:
            raise ValueError(
                f"`final` must be in [0, `peak`]. Received: final={final}, peak={peak}"
            )
        if not 0 <= warmup_steps < steps:
            raise ValueError(
                "`warmup_steps` must be at least 0 and less than `steps`. Received: "
                f"warmup_steps={warmup_steps}, steps={steps}"
            )
        self.peak, self.final = peak, final
        self.warmup_steps, self.steps = warmup_steps, steps

    @classmethod
    def over_epochs(
        cls,
        peak: float,
        examples: int,
        batch_size: int,
        epochs: float = 1,
        warmup: float = 0.03,
        final: float = 0.1,
    ) -> WarmupCosine:
        """Creates the schedule of a `fit` from the arguments of `fit`.

        Args:
            peak: Learning rate at the end of the warmup.
            examples: Number of examples, or of sequences if examples are packed.
            batch_size: Examples per step.
            epochs: Passes over the examples.
            warmup: Warmup as a fraction of all steps. Heuristic: the default is
                Alpaca's.
            final: Last learning rate as a fraction of `peak`. Heuristic: the default is
                LLaMA's.

        Example:
            >>> texts = ["The sea was calm."] * 8
            >>> schedule = WarmupCosine.over_epochs(2e-4, len(texts), batch_size=8)
            >>> lm.compile(optimizer=AdamW(schedule, weight_decay=0.0))
            >>> history = lm.fit(texts, batch_size=8, verbose=0)
        """
        steps = max(1, math.ceil(epochs * math.ceil(examples / batch_size)))
        warmup_steps = min(round(warmup * steps), steps - 1)
        return cls(peak, final * peak, warmup_steps, steps)

    def __call__(self, step: Tensor | int) -> Tensor:
        """Returns the learning rate of a step, a float32 scalar; steps start at 0."""
        step = ops.cast(step, "float32") + 1
        warmup = self.peak * (step / max(1, self.warmup_steps))
        progress = (step - self.warmup_steps) / (self.steps - self.warmup_steps)
        cosine = (1 + ops.cos(math.pi * ops.clip(progress, 0.0, 1.0))) / 2
        decay = self.final + (self.peak - self.final) * cosine
        return ops.where(step < self.warmup_steps, warmup, decay)

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments of the constructor."""
        return {
            "peak": self.peak,
            "final": self.final,
            "warmup_steps": self.warmup_steps,
            "steps": self.steps,
        }


def muon(
    learning_rate: float | keras.optimizers.schedules.LearningRateSchedule = 3e-4,
    weight_decay: float = 0.1,
    beta_1: float = 0.9,
    beta_2: float = 0.95,
    epsilon: float = 1e-8,
    global_clipnorm: float | None = 1.0,
) -> keras.optimizers.Muon:
    """Muon for the matrices of the layers; AdamW for embeddings, head and norms.

    The updates of matrices are orthogonalized and scaled to the size of AdamW's, so the
    same learning rates and weight decay apply. Small models learn faster with it.
    OpenLLaMA was trained with AdamW.

    Args:
        learning_rate: Learning rate, or its schedule.
        weight_decay: Weight decay of the matrices. Heuristic: the other variables have
            a tenth of it, since the embeddings of rare tokens get hardly any gradient.
        beta_1: Decay of AdamW's first moment.
        beta_2: Decay of AdamW's second moment.
        epsilon: AdamW's epsilon.
        global_clipnorm: Gradients are scaled down to this global norm.

    Returns:
        `keras.optimizers.Muon`.

    Example:
        >>> schedule = WarmupCosine(5e-3, final=1e-4, warmup_steps=50, steps=4000)
        >>> lm.compile(optimizer=muon(schedule))

    Sources: https://kellerjordan.github.io/posts/muon; the size of updates,
    arXiv:2502.16982.
    """
    return keras.optimizers.Muon(
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        adam_weight_decay=weight_decay / 10,
        adam_beta_1=beta_1,
        adam_beta_2=beta_2,
        epsilon=epsilon,
        global_clipnorm=global_clipnorm,
        exclude_layers=["lm_head"],
        name="muon",  # Fixed: checkpoints refer to it, and Keras would number it.
    )
