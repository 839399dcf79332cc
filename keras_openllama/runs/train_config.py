"""Settings of the training steps, shared by pretraining and fine-tuning.

`recipe.Recipe` adds the settings of pretraining data and meshes.
`finetune_config.FinetuneConfig` creates a `TrainConfig` when it knows how many steps
its epochs take. Importing this module imports neither Keras nor a backend.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from keras_openllama.runs import device_settings
from keras_openllama.utils import validation


def checked_field(
    check: Callable[[str, Any], Any], default: Any = dataclasses.MISSING
) -> Any:
    """Declares a dataclass field with a validator.

    Args:
        check: Function of the field's name and value that returns the value, maybe
            converted, or raises `ValueError`.
        default: Default value; without one the field is required.

    Returns:
        A `dataclasses.field`, the validator under `metadata["check"]`.
    """
    return dataclasses.field(default=default, metadata={"check": check})


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Settings of the training steps, validated.

    Attributes:
        sequence_length: Tokens per sequence.
        batch_size: Sequences per step, over all devices.
        steps: Steps of the run, and of the learning-rate schedule.
        learning_rate: Peak learning rate, at the end of the warmup.
        final_learning_rate: Learning rate at the end of the cosine decay.
        warmup_steps: Steps of the linear warmup; fewer than `steps`.
        beta_1: AdamW's decay rate of the first moment.
        beta_2: AdamW's decay rate of the second moment.
        epsilon: AdamW's epsilon.
        weight_decay: Multiplied by the learning rate. AdamW applies it to every
            parameter; Muon applies it to the matrices inside layers, and a tenth of it
            elsewhere.
        clip_norm: Global norm to which gradients are clipped.
        optimizer: `"adamw"` or `"muon"`, see `optimizers.muon`.
        z_loss: Weight of the z-loss, the squared log of the softmax denominator.
        rematerialize: Rematerialization policy, one of `config.REMATERIALIZATION`.
        micro_batches: Micro-batches for gradient accumulation; divides `batch_size`.
        milestone_every: Steps between permanent checkpoints; 0 disables them.
        save_every: Steps between checkpoints to resume from.
        keep_last: Number of most recent checkpoints to retain.
        validate_every: Steps between validations; 0 disables them.
        sample_every: Steps between generated samples; 0 disables them.
        spike_threshold: A step is skipped if its loss exceeds this multiple of the
            running mean; 0 disables the check.
        max_skipped_steps: Consecutive skipped steps after which the run ends.
        seed: Seed of the initial weights and of the order of the data.

    Raises:
        ValueError: for an invalid value, or values that conflict.
    """

    sequence_length: int = checked_field(validation.integer_at_least(1))
    batch_size: int = checked_field(validation.integer_at_least(1))
    steps: int = checked_field(validation.step_count)
    learning_rate: float = checked_field(validation.positive_number)
    final_learning_rate: float = checked_field(validation.positive_number)
    warmup_steps: int = checked_field(validation.integer_at_least(0))
    beta_1: float = checked_field(validation.fraction)
    beta_2: float = checked_field(validation.fraction)
    epsilon: float = checked_field(validation.positive_number)
    weight_decay: float = checked_field(validation.non_negative)
    clip_norm: float = checked_field(validation.positive_number)
    optimizer: str = checked_field(validation.one_of("adamw", "muon"), "adamw")
    z_loss: float = checked_field(validation.non_negative, 0.0)
    rematerialize: str = checked_field(device_settings.check_rematerialize, "none")
    micro_batches: int = checked_field(validation.integer_at_least(1), 1)
    milestone_every: int = checked_field(validation.integer_at_least(0), 2500)
    save_every: int = checked_field(validation.integer_at_least(1), 500)
    keep_last: int = checked_field(validation.integer_at_least(1), 2)
    validate_every: int = checked_field(validation.integer_at_least(0), 1000)
    sample_every: int = checked_field(validation.integer_at_least(0), 0)
    spike_threshold: float = checked_field(validation.threshold, 0.0)
    max_skipped_steps: int = checked_field(validation.integer_at_least(1), 10)
    seed: int = checked_field(validation.integer_at_least(0), 0)

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = field.metadata["check"](field.name, getattr(self, field.name))
            object.__setattr__(self, field.name, value)
        if self.final_learning_rate > self.learning_rate:
            raise ValueError(
                "`final_learning_rate` must not exceed `learning_rate`, the peak. Set "
                f"both. Received: learning_rate={self.learning_rate}, "
                f"final_learning_rate={self.final_learning_rate}"
            )
        if self.warmup_steps >= self.steps:
            raise ValueError(
                "`warmup_steps` must be less than `steps`. Set `warmup_steps` too. "
                f"Received: steps={self.steps}, warmup_steps={self.warmup_steps}"
            )
        if self.batch_size % self.micro_batches:
            raise ValueError(
                "`micro_batches` must divide `batch_size`. Change one of them. "
                f"Received: batch_size={self.batch_size}, "
                f"micro_batches={self.micro_batches}"
            )

    @property
    def tokens_per_step(self) -> int:
        """Tokens per step over all devices, including padding."""
        return self.batch_size * self.sequence_length
