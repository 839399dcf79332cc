"""AdamW and the schedule of LLaMA; Muon for small models."""

import math

import keras
from keras import ops

from keras_openllama.backend.keras_private import adam_moments

if keras.config.backend() == "tensorflow":
    import tensorflow


@keras.saving.register_keras_serializable(package="keras_openllama")
class AdamW(keras.optimizers.AdamW):
    """AdamW with LLaMA's settings, its epsilon where PyTorch and optax have it.

    Keras adds epsilon before it corrects the bias of the second moment, so that in the
    first steps it counts several times as much as elsewhere.

    Args:
        learning_rate: float, or a `keras.optimizers.schedules.LearningRateSchedule`.
        weight_decay: float, decoupled, of every variable, norms too, as EasyLM did.
        beta_1, beta_2, epsilon: floats.
        global_clipnorm: float, gradients are scaled down to this global norm.
        **kwargs: see `keras.optimizers.AdamW`.

    Example:

    ```python
    schedule = WarmupCosine(3e-4, final=3e-5, warmup_steps=2000, steps=250_000)
    lm.compile(optimizer=AdamW(schedule))
    ```

    Sources: arXiv:1711.05101; settings, LLaMA (arXiv:2302.13971), section 2.3.
    """

    def __init__(
        self,
        learning_rate=3e-4,
        weight_decay=0.1,
        beta_1=0.9,
        beta_2=0.95,
        epsilon=1e-8,
        global_clipnorm=1.0,
        name="adamw",
        **kwargs,
    ):
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

    def apply(self, grads, trainable_variables=None):
        if keras.config.backend() == "tensorflow":
            # It gives the embeddings' gradient by position, and Keras takes norm and
            # squares of that; they are meant of the sum by token.
            grads = [g if g is None else tensorflow.convert_to_tensor(g) for g in grads]
        return super().apply(grads, trainable_variables)

    def update_step(self, gradient, variable, learning_rate):
        first, second, largest = adam_moments(self, variable)
        gradient = ops.cast(gradient, variable.dtype)
        step = ops.cast(self.iterations + 1, variable.dtype)
        # 1 - beta ** step, without the loss of digits that a power has in float32.
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


@keras.saving.register_keras_serializable(package="keras_openllama")
class WarmupCosine(keras.optimizers.schedules.LearningRateSchedule):
    """Up in a straight line, then down along half a cosine.

    Args:
        peak: float, learning rate at the end of the warm-up.
        final: float, learning rate of the last step and of all after it.
        warmup_steps: int; the first step has a `warmup_steps`-th of the peak.
        steps: int, steps of the whole schedule.

    Raises:
        ValueError: if the rates or the steps are out of order.

    Example:

    ```python
    schedule = WarmupCosine(3e-4, final=3e-5, warmup_steps=2000, steps=250_000)
    schedule(1999)  # 3e-4
    ```

    Source: LLaMA (arXiv:2302.13971), section 2.3.
    """

    def __init__(self, peak, final, warmup_steps, steps):
        if not 0 <= final <= peak:
            raise ValueError(
                f"`final` is from 0 to `peak`. Received: final={final}, peak={peak}"
            )
        if not 0 <= warmup_steps < steps:
            raise ValueError(
                "`warmup_steps` is from 0 to less than `steps`. Received: "
                f"warmup_steps={warmup_steps}, steps={steps}"
            )
        self.peak, self.final = peak, final
        self.warmup_steps, self.steps = warmup_steps, steps

    @classmethod
    def over_epochs(cls, peak, rows, batch_size, epochs=1, warmup=0.03, final=0.1):
        """The schedule of a `fit`, by what `fit` is given.

        Args:
            peak: float, the highest learning rate.
            rows: int, rows of the data (examples, where they are not packed).
            batch_size: int, rows of a step.
            epochs: float.
            warmup: float, share of the steps in which the rate rises. (Ours, as those
                below: Alpaca's share, and a tenth as in LLaMA.)
            final: float, the last rate as a share of the peak.

        Example:

        ```python
        schedule = WarmupCosine.over_epochs(2e-4, len(texts), batch_size=8, epochs=3)
        lm.compile(optimizer=AdamW(schedule, weight_decay=0.0))
        lm.fit(texts, batch_size=8, epochs=3)
        ```
        """
        steps = max(1, math.ceil(epochs * math.ceil(rows / batch_size)))
        warmup_steps = min(round(warmup * steps), steps - 1)
        return cls(peak, final * peak, warmup_steps, steps)

    def __call__(self, step):
        step = ops.cast(step, "float32") + 1
        up = step / max(1, self.warmup_steps)
        along = (step - self.warmup_steps) / (self.steps - self.warmup_steps)
        cosine = (1 + ops.cos(math.pi * ops.clip(along, 0.0, 1.0))) / 2
        down = self.final + (self.peak - self.final) * cosine
        return ops.where(step < self.warmup_steps, self.peak * up, down)

    def get_config(self):
        return {
            "peak": self.peak,
            "final": self.final,
            "warmup_steps": self.warmup_steps,
            "steps": self.steps,
        }


def muon(
    learning_rate=3e-4,
    weight_decay=0.1,
    beta_1=0.9,
    beta_2=0.95,
    epsilon=1e-8,
    global_clipnorm=1.0,
):
    """Muon for the matrices inside the layers, AdamW for embeddings, head and norms.

    Updates of matrices are made orthogonal and as large as AdamW's, so rates and decay
    are of the same order as for `AdamW`. Small models learn faster by it; OpenLLaMA was
    not trained so.

    Args:
        learning_rate: float, or a `keras.optimizers.schedules.LearningRateSchedule`.
        weight_decay: float, of the matrices. Ours: a tenth of it elsewhere, since the
            embeddings of rare tokens get next to no gradient.
        beta_1, beta_2, epsilon: floats, of AdamW.
        global_clipnorm: float, gradients are scaled down to this global norm.

    Returns:
        `keras.optimizers.Muon`.

    Example:

    ```python
    lm.compile(optimizer=muon(WarmupCosine(5e-3, 1e-4, warmup_steps=50, steps=4000)))
    ```

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
        name="muon",  # Keras would number them, and checkpoints go by name.
    )
