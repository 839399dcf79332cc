"""What `fit` watches for, beside what users give it."""

import math
import warnings

import keras


class SkippedSteps(keras.callbacks.Callback):
    """Tells how many steps were left out since loss or gradient was not finite.

    The optimizer does not count those.

    Raises:
        FloatingPointError: after an epoch of which every step was left out.
    """

    def on_epoch_begin(self, epoch, logs=None):
        self._before = int(self.model.optimizer.iterations)
        self._steps = 0

    def on_train_batch_end(self, batch, logs=None):
        self._steps = batch + 1

    def on_epoch_end(self, epoch, logs=None):
        optimizer = self.model.optimizer
        if optimizer.gradient_accumulation_steps or not self._steps:
            return  # It counts something else, or there was nothing to count.
        left_out = self._steps - (int(optimizer.iterations) - self._before)
        if not left_out:
            return
        message = (
            f"{left_out} of the {self._steps} steps of this epoch had a loss or "
            "gradient that is not finite. They were left out, and changed no weight. "
            f"Lower the learning rate, {float(optimizer.learning_rate):g} now, and "
            "look for broken examples."
        )
        if left_out == self._steps:
            raise FloatingPointError(message)
        warnings.warn(message, stacklevel=2)


class BitsPerByte(keras.callbacks.Callback):
    """Adds `val_bits_per_byte` to the logs.

    Args:
        bytes_per_target: float, UTF-8 bytes of the validation text for each token of
            it that is predicted.
    """

    def __init__(self, bytes_per_target):
        super().__init__()
        self._bytes_per_target = bytes_per_target

    def on_epoch_end(self, epoch, logs=None):
        if logs is not None and "val_loss" in logs:
            bits = logs["val_loss"] / math.log(2)
            logs["val_bits_per_byte"] = bits / self._bytes_per_target
