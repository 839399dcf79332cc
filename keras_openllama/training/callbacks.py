"""Callbacks that `fit` adds to those of the user."""

from __future__ import annotations

import math
import warnings
from typing import Any

import keras

from keras_openllama.backend.keras_private import loss_tracker
from keras_openllama.training.loss_scaling import has_dynamic_loss_scale
from keras_openllama.training.target_weights import no_targets_error


class SkippedSteps(keras.callbacks.Callback):
    """Warns about steps that were skipped because loss or gradient was not finite.

    Skipped steps do not increment `optimizer.iterations`, so they are counted by it.

    Raises:
        FloatingPointError: after an epoch in which every step was skipped.
        ValueError: after an epoch without target tokens.
    """

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Reads the iteration number of the optimizer."""
        self._iterations_before = int(self.model.optimizer.iterations)
        self._steps, self._targets = 0, None

    def on_test_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Reads the number of targets of the epoch, which validation resets."""
        self._targets = float(loss_tracker(self.model).count)

    def on_train_batch_end(
        self, batch: int, logs: dict[str, Any] | None = None
    ) -> None:
        """Counts the steps of the epoch."""
        self._steps = batch + 1

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Warns, or raises an error if all steps were skipped."""
        if not self._steps:
            return
        if self._targets is None:  # There was no validation.
            self.on_test_begin()
        if not self._targets:
            raise no_targets_error("The batches of this epoch have")
        optimizer = self.model.optimizer
        inner_optimizer = getattr(optimizer, "inner_optimizer", optimizer)
        is_finite = math.isfinite((logs or {}).get("loss", math.nan))
        if inner_optimizer.gradient_accumulation_steps:
            # Iterations do not count steps.
            if not is_finite:
                warnings.warn(self._message("Some"), stacklevel=2)
            return
        applied = int(optimizer.iterations) - self._iterations_before
        skipped = self._steps - applied
        if not skipped or (applied and is_finite and has_dynamic_loss_scale(optimizer)):
            return  # A dynamic scale of the loss is found by skipping some steps.
        message = self._message(f"{skipped} of the {self._steps}")
        if is_finite and has_dynamic_loss_scale(optimizer):
            scale = float(optimizer.dynamic_scale)
            warnings.warn(
                f"{message} The scale of the loss was reduced to {scale:g}.",
                stacklevel=2,
            )
        elif not applied:
            raise FloatingPointError(message)
        else:
            warnings.warn(message, stacklevel=2)

    def _message(self, steps):
        rate = float(self.model.optimizer.learning_rate)
        message = (
            f"{steps} steps of this epoch were skipped, because they have no target "
            "tokens, or their loss or gradient was not finite. Skipped steps change no "
            f"weights. Reduce the learning rate (now {rate:g}) and check the examples."
        )
        return message + float16_advice(self.model)


class NotFiniteLoss(keras.callbacks.Callback):
    """Warns after an epoch whose loss is not finite.

    It is for losses other than the default one, for which `SkippedSteps` does more.
    """

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Warns if the mean loss of the epoch is not finite."""
        warn_if_not_finite(self.model, (logs or {}).get("loss", 0.0))


def warn_if_not_finite(model: keras.Model, loss: float) -> None:
    """Warns about a loss that is not finite.

    Args:
        model: the model.
        loss: its loss.

    Example:
        >>> warn_if_not_finite(lm, 6.92)
    """
    if not math.isfinite(loss):
        warnings.warn(
            f"The loss is {loss}, because a logit is not finite. Check the weights."
            f"{float16_advice(model)}",
            stacklevel=3,
        )


def float16_advice(model: keras.Model) -> str:
    """Returns what to do about values that are not finite in a float16 model.

    Args:
        model: the model.

    Returns:
        A sentence that starts with a space; empty for other dtypes.

    Example:
        >>> float16_advice(lm)
        ''
    """
    if model.dtype_policy.compute_dtype != "float16":
        return ""
    return (
        " The model computes in float16, whose largest number is 65504: load it with "
        'dtype="mixed_bfloat16" or "float32" instead.'
    )


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
