"""What a run writes to be watched: losses, validation, samples, TensorBoard.

A run's directory holds

    metrics.jsonl       one JSON object a training step
    validation.jsonl    one JSON object an evaluation
    skipped.jsonl       one JSON object a step that was left out: what it had read
    samples.txt         texts that the model wrote
    tensorboard/        the same as events, for `tensorboard --logdir DIRECTORY`

A training record has `step` (from 1), `loss` (nats per token), `accuracy` (0 to 1),
`targets` (of the step), `learning_rate`, `grad_norm`, `param_norm`, `batch` (16 digits
that stand for the tokens read), `tokens` (of the run so far), `tokens_per_second`,
`tokens_per_second_per_chip`, `mfu` (0 to 1, where the peak of the chip is known),
`data_seconds`, `compute_seconds`, `checkpoint_seconds` (since the record before),
`goodput` (0 to 1) and `skipped` (bool, whether the update was thrown away).

A validation record has `step`, `tokens`, `loss`, `perplexity`, `bits_per_byte` (means),
and `sources`: for each name its own `loss`, `perplexity` and `bits_per_byte`.

The files are strict JSON: every float comes back to the last bit, and what JSON has no
word for is the string "NaN", "Infinity" or "-Infinity".
"""

import contextlib
import json
import logging
import math
import os
import re

from keras_openllama.runs.tensorboard_events import (
    TensorBoardEvents,
    naming_file,
    scalars_of,
)
from keras_openllama.utils import files

METRICS = "metrics.jsonl"
VALIDATION = "validation.jsonl"
SKIPPED = "skipped.jsonl"
SAMPLES = "samples.txt"
TENSORBOARD = "tensorboard"

_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
_INDENT = b"    "


class RunLog:
    """Writes a run's directory; after a resume it is as if nothing had happened.

    Everything after the step that the run resumes from is dropped, and so is a last
    line that a kill has torn. Within a step, write everything, `sync`, and save the
    checkpoint last: then no checkpoint knows of a step that the log does not.

    One process of a run opens it. Writing that fails (a full disk) raises: a run that
    nobody can watch is not to go on in silence.

    Args:
        directory: path on this machine; made if it is not there.
        from_step: int, the step whose checkpoint the run resumes from; 0 for a new run.

    Attributes:
        last_step: int or None, the last step in `metrics.jsonl`.
        last_validation_step: int or None, the last step in `validation.jsonl`; whoever
            evaluates before the first step asks whether it is there already.

    Raises:
        ValueError: if `directory` is remote, or a file in it holds something else than
            records; the message names the file and the line.
        OSError: if the disk is full, or the directory cannot be written to.

    Example:
        with RunLog("runs/3b_v3", from_step=0) as log:
            log.write({"step": 1, "loss": 10.4, "tokens": 4194304})
            log.write({"kind": "validation", "step": 1, "tokens": 4194304, "loss": 9.8})
            log.text("sea", 1, "The captain looked at the sea and said, …")
            log.sync()
    """

    def __init__(self, directory, from_step):
        if files.is_remote(directory):
            raise ValueError(
                f"directory={str(directory)!r} is remote, and lines are appended to "
                "local files only; log to a local directory and copy it"
            )
        self.directory = str(directory)
        files.make_directory(directory)
        metrics, validation, skipped, samples = (
            files.join(directory, name)
            for name in (METRICS, VALIDATION, SKIPPED, SAMPLES)
        )
        self.last_step = _keep(metrics, from_step, _lines)
        self.last_validation_step = _keep(validation, from_step, _lines)
        _keep(skipped, from_step, _lines)
        _keep(samples, from_step, _entries)
        if from_step > 0 and self.last_step != from_step:
            logging.getLogger(__name__).warning(
                "%s ends at step %s, but the run resumes from step %d: what is between "
                "is missing, and stays so",
                *(metrics, self.last_step or 0, from_step),
            )
        # Closes all of them, whichever fails to.
        self._open = contextlib.ExitStack()
        self._metrics = self._open.enter_context(_Appended(metrics))
        self._validation = self._open.enter_context(_Appended(validation))
        self._skipped = self._open.enter_context(_Appended(skipped))
        self._samples = self._open.enter_context(_Appended(samples))
        self._events = self._open.enter_context(
            TensorBoardEvents(files.join(directory, TENSORBOARD), from_step)
        )

    def write(self, record):
        """Appends a record to its file, and to TensorBoard.

        Args:
            record: dict with `step`; values are numbers, NumPy's or JAX's scalars,
                strings or dicts of them, and what is `None` is left out. With
                `"kind": "validation"` it goes to `validation.jsonl`, without the kind.

        Raises:
            ValueError: if it has no step, or one not after that of the record before.
            OSError: if it cannot be written.
        """
        record = _plain(record)
        kind = record.pop("kind", "train")
        if kind not in ("train", "validation"):
            raise ValueError(
                f"record has kind={kind!r}; it is 'validation', or left out"
            )
        if type(record.get("step")) is not int:
            raise ValueError(
                f"record has step={record.get('step')!r}; give it one, an integer"
            )
        training = kind == "train"
        last = self.last_step if training else self.last_validation_step
        if last is not None and record["step"] <= last:
            name = METRICS if training else VALIDATION
            raise ValueError(
                f"record has step={record['step']}, but {self.directory}/{name} "
                f"already reaches step {last}; each step is written once, in order"
            )
        line = json.dumps(_without_nan(record), allow_nan=False) + "\n"
        (self._metrics if training else self._validation).append(line.encode())
        if training:
            self.last_step = record["step"]
        else:
            self.last_validation_step = record["step"]
        self._events.scalars(record["step"], scalars_of(record, training))

    def skip(self, record):
        """Appends what a step that was left out has read to `skipped.jsonl`.

        Args:
            record: dict with `step`, see `write`; lists are allowed too.

        Raises:
            OSError: if it cannot be written.
        """
        line = json.dumps(_without_nan(record), allow_nan=False) + "\n"
        self._skipped.append(line.encode())

    def text(self, tag, step, text):
        """Appends a text to `samples.txt`, under its step, and to TensorBoard.

        Args:
            tag: string of one line, what the text is of (a prompt's name).
            step: int.
            text: string.

        Raises:
            ValueError: if the tag is not one line.
            OSError: if it cannot be written.
        """
        if tag.splitlines() != [tag]:
            raise ValueError(f"tag={tag!r} is not one line; give a short name")
        data = text.encode("utf-8", "backslashreplace")
        lines = [f"step {step}, {tag}".encode(), *data.split(b"\n")]
        # Indented, so that no text looks like the end of an entry.
        data = (b"\n" + _INDENT).join(lines) + b"\n\n"
        self._samples.append(data)
        self._events.text(step, tag, text)

    def sync(self):
        """Waits until everything is on the disk; call it before saving a checkpoint."""
        parts = (self._metrics, self._validation, self._skipped, self._samples)
        for part in (*parts, self._events):
            part.sync()

    def close(self):
        """Writes what is left of TensorBoard's events, and closes the files."""
        self._open.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def read(directory):
    """The training records of a run, also while it is going on.

    Args:
        directory: a run's directory.

    Returns:
        List of dicts, in order, see this module; a torn last line is left out.

    Raises:
        FileNotFoundError: if there is no `metrics.jsonl`.
        ValueError: if a line is no record; the message names it.

    Example:
        losses = [record["loss"] for record in read("runs/3b_v3")]
    """
    path = files.join(directory, METRICS)
    if not os.path.exists(path):
        raise FileNotFoundError(
            f"{directory} has no {METRICS}; give the directory of a run, "
            "the --output of `keras-openllama pretrain`"
        )
    return [record for _, record in _read_lines(path)]


def read_validation(directory):
    """The validation records of a run, as `read`; none if it never evaluated."""
    path = files.join(directory, VALIDATION)
    if not os.path.exists(path):
        return []
    return [record for _, record in _read_lines(path)]


def has_sample(directory, step):
    """Whether `samples.txt` has a text of a step: bool."""
    path = files.join(directory, SAMPLES)
    if not os.path.exists(path):
        return False
    return any(found == step for found, _ in _entries(path))


def _read_lines(path):
    """Yields each line of a file, as bytes, and the record in it."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                record = json.loads(line, object_hook=_with_nan)
                if not (line.endswith(b"\n") and isinstance(record["step"], int)):
                    raise ValueError("no whole record")
            except (KeyError, TypeError, ValueError):
                if not file.peek(1):
                    return  # The last line: torn by a kill, or being written now.
                shown = line[:60].decode("utf-8", "backslashreplace")
                raise ValueError(
                    f"{path}, line {number}, is no JSON object with a step: {shown!r}; "
                    "mend the line or remove it"
                ) from None
            yield line, record


def _lines(path):
    for line, record in _read_lines(path):
        yield record["step"], line


def _entries(path):
    """Yields the step and the bytes of each whole entry of `samples.txt`."""
    with open(path, "rb") as file:
        *entries, _ = file.read().split(b"\n\n")
    for number, entry in enumerate(entries, 1):
        step = re.match(rb"step (-?\d+), ", entry)
        if not step:
            raise ValueError(
                f"{path}, entry {number}, does not begin with 'step N, '; mend it, or "
                "move the file away"
            )
        yield int(step[1]), entry + b"\n\n"


def _keep(path, from_step, parts):
    """Drops parts of a file whose step is later; returns the last step that stays."""
    last = None
    if not os.path.exists(path):
        return last
    with files.atomic_write(path) as unfinished, open(unfinished, "wb") as kept:
        for step, part in parts(path):
            if step <= from_step:
                kept.write(part)
                last = step
    return last


class _Appended:
    """A file that grows by whole pieces; what is in it is not lost if we are killed."""

    def __init__(self, path):
        self._path = path
        # Without a buffer: a failure is known at once, and nothing is written later.
        self._file = open(path, "ab", buffering=0)

    def append(self, data):
        rest = memoryview(data)
        with naming_file(self._path):
            while rest:  # A disk that is nearly full takes a part first.
                rest = rest[self._file.write(rest) :]

    def sync(self):
        with naming_file(self._path):
            os.fsync(self._file.fileno())

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._file.close()


def _plain(value):
    """Python's own numbers in place of NumPy's and JAX's; without what is `None`."""
    if isinstance(value, dict):
        return {key: _plain(v) for key, v in value.items() if v is not None}
    return value.item() if hasattr(value, "item") else value


def _without_nan(value):
    if isinstance(value, dict):
        return {key: _without_nan(v) for key, v in value.items()}
    if not isinstance(value, float) or math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _with_nan(record):
    return {
        key: _NOT_FINITE.get(value, value) if isinstance(value, str) else value
        for key, value in record.items()
    }
