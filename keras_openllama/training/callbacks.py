"""Callbacks that `fit` adds to those of the user."""

from __future__ import annotations

import math
import warnings
from typing import Any

import keras


class SkippedSteps(keras.callbacks.Callback):
    """Warns about steps that were skipped because loss or gradient was not finite.

    Skipped steps do not increment `optimizer.iterations`, so they are counted by it.

    Raises:
        FloatingPointError: after an epoch in which every step was skipped.
    """

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Reads the iteration number of the optimizer."""
        self._iterations_before = int(self.model.optimizer.iterations)
        self._steps = 0

    def on_train_batch_end(
        self, batch: int, logs: dict[str, Any] | None = None
    ) -> None:
        """Counts the steps of the epoch."""
        self._steps = batch + 1

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Warns, or raises an error if all steps were skipped."""
        optimizer = self.model.optimizer
        if optimizer.gradient_accumulation_steps or not self._steps:
            return  # With gradient accumulation, iterations do not count steps.
        applied = int(optimizer.iterations) - self._iterations_before
        skipped = self._steps - applied
        if not skipped:
            return
        message = (
            f"{skipped} of the {self._steps} steps of this epoch were skipped, because "
            "their loss or gradient was not finite. Skipped steps change no weights. "
            f"Reduce the learning rate (now {float(optimizer.learning_rate):g}) and "
            "check the examples."
        )
        if skipped == self._steps:
            raise FloatingPointError(message)
        warnings.warn(message, stacklevel=2)


class BitsPerByte(keras.callbacks.Callback):
    """Adds `val_bits_per_byte` to the logs of an epoch.

    Args:
        bytes_per_target: UTF-8 bytes of the validation text, per token that is
            predicted.

    Example:
        >>> logs = {"val_loss": math.log(2)}
        >>> BitsPerByte(bytes_per_target=4.0).on_epoch_end(0, logs)
        >>> logs["val_bits_per_byte"]
        0.25
    """

    def __init__(self, bytes_per_target: float):
        super().__init__()
        self._bytes_per_target = bytes_per_target

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Computes bits per byte from the validation loss."""
        if logs is not None and "val_loss" in logs:
            bits = logs["val_loss"] / math.log(2)
            logs["val_bits_per_byte"] = bits / self._bytes_per_target
