"""The settings of training: what decides the course of a run's steps.

`recipe.Recipe` adds the data of pretraining and its meshes; `finetuning.FinetuneConfig`
makes one once it knows how many steps its epochs take. Importing it needs neither Keras
nor a backend.
"""

import dataclasses

from keras_openllama.runs import device_settings
from keras_openllama.utils import validation


def setting(check, default=dataclasses.MISSING):
    """A field of a dataclass whose value `check(name, value)` returns or refuses."""
    return dataclasses.field(default=default, metadata={"check": check})


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Settings of the training steps, checked.

    Attributes:
        sequence_length: int, tokens that a sequence reads and predicts.
        batch_size: int, sequences of a step, over all devices.
        steps: int, steps of the run, and where the cosine of the learning rate ends.
        learning_rate: float, the peak, at the end of the warmup.
        final_learning_rate: float, the value at the end of the cosine.
        warmup_steps: int, steps of the linear warmup; below `steps`.
        beta_1, beta_2, epsilon: floats, AdamW's.
        weight_decay: float, times the learning rate; with AdamW of every parameter,
            with Muon of the matrices inside layers, and a tenth of it elsewhere.
        clip_norm: float, global norm that gradients are scaled down to.
        optimizer: string, `"adamw"` or `"muon"`, see `optimizers.muon`.
        z_loss: float, weight of the squared logarithm of the softmax's denominator.
        rematerialize: string, what is saved for the backward pass, one of
            `config.REMATERIALIZATION`.
        micro_batches: int, parts of a batch, one after the other; divides it.
        milestone_every: int, steps between checkpoints that are kept; 0 is never.
        save_every: int, steps between checkpoints to resume from.
        keep_last: int, how many of those are kept.
        validate_every: int, steps between validations; 0 is never.
        sample_every: int, steps between texts that the model writes; 0 is never.
        spike_threshold: float, a step is skipped whose loss is above so many times
            its running mean; 0 is never.
        max_skipped_steps: int, steps skipped in a row that end the run.
        seed: int, of the initial weights and the order of the data.

    Raises:
        ValueError: for a value that is not allowed, or does not fit the others.
    """

    sequence_length: int = setting(validation.integer_at_least(1))
    batch_size: int = setting(validation.integer_at_least(1))
    steps: int = setting(validation.integer_at_least(1))
    learning_rate: float = setting(validation.positive_number)
    final_learning_rate: float = setting(validation.positive_number)
    warmup_steps: int = setting(validation.integer_at_least(0))
    beta_1: float = setting(validation.fraction)
    beta_2: float = setting(validation.fraction)
    epsilon: float = setting(validation.positive_number)
    weight_decay: float = setting(validation.non_negative)
    clip_norm: float = setting(validation.positive_number)
    optimizer: str = setting(validation.one_of("adamw", "muon"), "adamw")
    z_loss: float = setting(validation.non_negative, 0.0)
    rematerialize: str = setting(device_settings.rematerialize, "none")
    micro_batches: int = setting(validation.integer_at_least(1), 1)
    milestone_every: int = setting(validation.integer_at_least(0), 2500)
    save_every: int = setting(validation.integer_at_least(1), 500)
    keep_last: int = setting(validation.integer_at_least(1), 2)
    validate_every: int = setting(validation.integer_at_least(0), 1000)
    sample_every: int = setting(validation.integer_at_least(0), 0)
    spike_threshold: float = setting(validation.threshold, 0.0)
    max_skipped_steps: int = setting(validation.integer_at_least(1), 10)
    seed: int = setting(validation.integer_at_least(0), 0)

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = field.metadata["check"](field.name, getattr(self, field.name))
            object.__setattr__(self, field.name, value)
        if self.final_learning_rate > self.learning_rate:
            raise ValueError(
                "`final_learning_rate` must not be above the peak. Give it along with "
                f"`learning_rate`. Received: learning_rate={self.learning_rate}, "
                f"final_learning_rate={self.final_learning_rate}"
            )
        if self.warmup_steps >= self.steps:
            raise ValueError(
                "`warmup_steps` must be below `steps`. Give `warmup_steps` too. "
                f"Received: steps={self.steps}, warmup_steps={self.warmup_steps}"
            )
        if self.batch_size % self.micro_batches:
            raise ValueError(
                "`micro_batches` must divide `batch_size`. Change one of them. "
                f"Received: batch_size={self.batch_size}, "
                f"micro_batches={self.micro_batches}"
            )

    @property
    def tokens_per_step(self):
        """Tokens of a step's sequences, padding included, over all devices."""
        return self.batch_size * self.sequence_length
