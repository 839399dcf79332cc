"""The settings of a fine-tuning run."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from keras_openllama.runs.train_config import TrainConfig
from keras_openllama.training.fit import ADAPTER_LEARNING_RATE, LEARNING_RATE

_FINAL_RATE = 0.1  # The final learning rate as a fraction of the peak, as in LLaMA.
# Paths may change between starts of a run; their contents are compared instead.
_FILES = ("data", "validation")


@dataclasses.dataclass(frozen=True)
class FinetuneConfig:
    """Settings of a fine-tuning run; each is a flag of `keras-openllama finetune`.

    Attributes:
        preset: Preset, directory or `hf://` handle of the model.
        data: Paths of the examples.
        prompt: Template of prompts, `"{prompt}"` by default.
        response: Template of responses, `"{response}"` by default.
        chat_template: Template of chats, see `OpenLlamaCausalLMPreprocessor`; by
            default that of the model.
        validation: Path of held-out examples; by default, a fraction of `data`.
        validation_fraction: Fraction of the examples to hold out, 0 to 1.
        sequence_length: Tokens per sequence.
        pack: Whether sequences hold several examples (packing).
        lora_rank: Rank of LoRA adapters; `None` (`--lora-rank 0`) trains all weights.
        lora_alpha: LoRA alpha; updates are scaled by `lora_alpha / lora_rank`. Defaults
            to the rank, a scale of 1.
        lora_targets: Names of the layers with adapters.
        quantization: `"int8"` or `"int4"`, to which the base weights are quantized
            while they are loaded; requires `lora_rank`. `None` leaves them as in the
            files.
        dtype: Dtype policy of the model; the command line chooses by device.
        epochs: Passes over the examples.
        batch_size: Sequences per step, over all devices.
        learning_rate: Peak learning rate; the default depends on `lora_rank`.
        warmup: Warmup steps as a fraction of all steps, below 1.
        weight_decay: See `TrainConfig`.
        micro_batches: See `TrainConfig`.
        rematerialize: See `TrainConfig`.
        seed: Seed of the adapters' initial values, of the order of the examples, and of
            the choice of held-out examples.
        save_every: See `TrainConfig`.
        validate_every: Steps between validations; by default a tenth of all steps.

    Raises:
        ValueError: if a setting is invalid.
    """

    preset: str
    data: tuple[str, ...]
    prompt: str | None = None
    response: str | None = None
    chat_template: dict[str, str] | str | None = None
    validation: str | None = None
    validation_fraction: float = 0.05
    sequence_length: int = 512
    pack: bool = False
    lora_rank: int | None = None
    lora_alpha: float | None = None
    lora_targets: tuple[str, ...] | None = None
    quantization: str | None = None
    dtype: str = "float32"
    epochs: float = 3.0
    batch_size: int = 8
    learning_rate: float | None = None
    warmup: float = 0.03
    weight_decay: float = 0.0
    micro_batches: int = 1
    rematerialize: str = "none"
    seed: int = 0
    save_every: int = 100
    validate_every: int | None = None

    def __post_init__(self):
        if not 0 <= self.warmup < 1:
            raise ValueError(
                "`warmup` must be in [0, 1), a fraction of all steps. Received: "
                f"warmup={self.warmup}"
            )
        self.train_config(steps=1)  # Checks the other settings of the steps.

    def train_config(self, steps: int) -> TrainConfig:
        """Returns the settings of the training steps.

        Args:
            steps: Steps of the run.

        Returns:
            The settings.

        Raises:
            ValueError: if a setting is invalid.

        Example:
            >>> config = FinetuneConfig("nano", ("examples.jsonl",), lora_rank=4)
            >>> config.train_config(steps=100).warmup_steps
            3
        """
        rate = self.learning_rate
        if rate is None:
            rate = ADAPTER_LEARNING_RATE if self.lora_rank else LEARNING_RATE
        return TrainConfig(
            sequence_length=self.sequence_length,
            batch_size=self.batch_size,
            steps=steps,
            learning_rate=rate,
            final_learning_rate=_FINAL_RATE * rate,
            warmup_steps=min(round(self.warmup * steps), steps - 1),
            beta_1=0.9,
            beta_2=0.95,
            epsilon=1e-8,
            clip_norm=1.0,
            weight_decay=self.weight_decay,
            micro_batches=self.micro_batches,
            rematerialize=self.rematerialize,
            seed=self.seed,
            save_every=self.save_every,
            milestone_every=0,  # Checkpoints are for resuming only.
            # Ten validations by default.
            validate_every=self.validate_every or max(1, steps // 10),
        )

    def to_json(self) -> dict[str, Any]:
        """Returns the settings in the form of a recipe in `run.json`."""
        values = dataclasses.asdict(self)
        settings = {
            name: {"value": value}
            for name, value in values.items()
            if name not in ("preset", *_FILES)
        }
        return json.loads(json.dumps({"preset": self.preset, "recipe": settings}))
