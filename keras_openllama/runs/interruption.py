"""How a run ends early: signals, steps that had to be skipped, and exit codes."""

import contextlib
import signal

import jax
from jax.experimental import multihost_utils

# Exit codes of both commands, beside 0 and Python's own. From sysexits.h.
STOPPED = 75  # EX_TEMPFAIL: a signal came, all is saved; the same command resumes it.
DIVERGED = 70  # EX_SOFTWARE: too many steps in a row had to be skipped.
NOT_WRITTEN = 74  # EX_IOERR: a checkpoint or a log could not be written.


_ADVICE = (
    "What they read is in skipped.jsonl. Try a lower learning rate (--set "
    "learning_rate=…, or --learning-rate of finetune) with --accept-changes, or "
    "another seed in another output directory."
)


class DataNotRead(Exception):
    """A file of the data is damaged or gone, or its file system is."""


@contextlib.contextmanager
def reading_data():
    """Tells errors of reading data from those of writing a run."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise DataNotRead(f"The data could not be read: {error}") from error


class Diverged(Exception):
    """Too many steps in a row had to be skipped."""


class StopRequest:
    """Whether a signal asks the run to save and end, the same on all hosts.

    One process listens to SIGTERM and SIGINT; a second one ends it without a save.
    Several that `jax.distributed` joins agree on the step by JAX's preemption service,
    which listens to SIGTERM alone.

    Example:

    ```python
    with StopRequest() as stop:
        for step in steps:
            train()
            if stop.at(step):
                break
    ```
    """

    def __init__(self):
        self.signal = None

    def __enter__(self):
        self._before = {}
        if jax.process_count() == 1:
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_):
        for number, handler in self._before.items():
            with contextlib.suppress(TypeError):  # One that Python did not set.
                signal.signal(number, handler)

    def _note(self, number, frame):
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number).name

    def at(self, step):
        """Whether to end after a step; every process asks after each.

        Args:
            step: int.
        """
        if jax.process_count() == 1:
            return self.signal is not None
        if multihost_utils.reached_preemption_sync_point(step):
            self.signal = "SIGTERM"
        return self.signal is not None


class Skipped:
    """Counts steps that were skipped, and gives up after too many in a row.

    Args:
        most: int, how many in a row end the run.
    """

    def __init__(self, most):
        self._most = most
        self._in_a_row, self.total = 0, 0

    def note(self, step, applied, loss, grad_norm):
        """Takes note of a step.

        Raises:
            Diverged: if that many have been skipped in a row.
        """
        self._in_a_row = 0 if applied else self._in_a_row + 1
        self.total += not applied
        if self._in_a_row >= self._most:
            raise Diverged(
                f"The last {self._most} steps up to step {step} had a loss or gradient "
                f"that is not finite, or a spike (loss {loss}, gradient norm "
                f"{grad_norm}). None of them changed the model. {_ADVICE}"
            )
