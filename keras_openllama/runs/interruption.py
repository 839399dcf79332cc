"""How a run ends early: signals, skipped steps, unreadable data; and exit codes."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType

import jax
from jax.experimental import multihost_utils

# Exit codes of `pretrain` and `finetune` besides 0 and Python's own, from sysexits.h.
STOPPED = 75  # EX_TEMPFAIL: stopped by a signal and saved; run the command to resume.
DIVERGED = 70  # EX_SOFTWARE: the run has diverged.
WRITE_FAILED = 74  # EX_IOERR: a checkpoint or a log could not be written.


_ADVICE = (
    "The sequences that they read are listed in skipped.jsonl. Try a lower learning "
    "rate (--set learning_rate=…, or --learning-rate of finetune) with "
    "--accept-changes, or another seed in another output directory."
)


class DataReadError(Exception):
    """A file of the training data is damaged, missing or unreadable."""


@contextlib.contextmanager
def reading_data() -> Iterator[None]:
    """Converts errors of reading data, to distinguish them from errors of writing.

    Raises:
        DataReadError: in place of an `OSError` or `ValueError` of the block.
    """
    try:
        yield
    except (OSError, ValueError) as error:
        raise DataReadError(f"The data could not be read: {error}") from error


class DivergedError(Exception):
    """Too many consecutive steps were skipped, or the validation loss is not finite."""


class StopRequest:
    """Whether a signal asks the run to save and exit; the same answer on all hosts.

    A single process handles SIGTERM and SIGINT; a second signal ends it without
    saving. Processes joined by `jax.distributed` agree on the step with JAX's
    preemption sync manager, which handles SIGTERM only. Use it as a context manager.

    Attributes:
        signal: Name of the signal that was received, or `None`.

    Example:
        >>> with StopRequest() as stop:
        ...     for step in range(1, 3):
        ...         if stop.requested(step):
        ...             break
        >>> print(stop.signal)
        None
    """

    def __init__(self):
        self.signal: str | None = None

    def __enter__(self) -> StopRequest:
        self._previous_handlers = {}
        if jax.process_count() == 1:
            for number in (signal.SIGTERM, signal.SIGINT):
                previous = signal.signal(number, self._handle_signal)
                self._previous_handlers[number] = previous
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous_handlers.items():
            # A handler that was not installed from Python cannot be restored.
            with contextlib.suppress(TypeError):
                signal.signal(number, handler)

    def _handle_signal(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number).name

    def requested(self, step: int) -> bool:
        """Returns whether to stop after a step; every process calls it at every step.

        Args:
            step: Steps done.

        Returns:
            Whether a signal was received, on any host.
        """
        if jax.process_count() == 1:
            return self.signal is not None
        if multihost_utils.reached_preemption_sync_point(step):
            self.signal = "SIGTERM"
        return self.signal is not None


class SkippedSteps:
    """Counts skipped steps, and raises after too many consecutive ones.

    Args:
        max_consecutive: Number of consecutive skipped steps that ends the run.

    Attributes:
        total: Number of skipped steps.

    Example:
        >>> skipped = SkippedSteps(max_consecutive=10)
        >>> skipped.record(1, applied=False, loss=float("nan"), grad_norm=1.0)
        >>> skipped.total
        1
    """

    def __init__(self, max_consecutive: int):
        self._max_consecutive = max_consecutive
        self._consecutive, self.total = 0, 0

    def record(
        self, step: int, applied: bool, loss: float, grad_norm: float | None
    ) -> None:
        """Records whether a step was applied.

        Args:
            step: Steps done.
            applied: Whether the step's update was applied.
            loss: Loss of the step, for the error message.
            grad_norm: Gradient norm of the step, for the error message.

        Raises:
            DivergedError: if too many consecutive steps were skipped.
        """
        self._consecutive = 0 if applied else self._consecutive + 1
        self.total += not applied
        if self._consecutive >= self._max_consecutive:
            raise DivergedError(
                f"The last {self._max_consecutive} steps up to step {step} were "
                "skipped: the loss or the gradient was not finite, or the loss spiked "
                f"(loss {loss}, gradient norm {grad_norm}). None of them changed the "
                f"model. {_ADVICE}"
            )
