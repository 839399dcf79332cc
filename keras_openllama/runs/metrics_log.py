"""The log of a run: metrics, validations, skipped steps, samples, TensorBoard.

A run's directory holds

    metrics.jsonl       one JSON object per training step
    validation.jsonl    one JSON object per validation
    skipped.jsonl       one JSON object per skipped step: the sequences that it read
    samples.txt         texts that the model generated
    tensorboard/        the same as events, for `tensorboard --logdir DIRECTORY`

A training record has `step` (from 1), `loss` (nats per token), `accuracy` (0 to 1),
`targets` (of the step), `learning_rate`, `grad_norm`, `param_norm`, `batch` (16
hexadecimal digits that identify the sequences), `tokens` (of the run so far),
`tokens_per_second`, `tokens_per_second_per_chip`, `mfu` (0 to 1, if the peak FLOP/s of
the chip is known), `data_seconds`, `compute_seconds`, `checkpoint_seconds` (since the
previous record), `goodput` (0 to 1) and `skipped` (bool, whether the update was
discarded).

A validation record has `step`, `tokens`, `loss`, `perplexity`, `bits_per_byte` (means
over the sources), and `sources`: the `loss`, `perplexity` and `bits_per_byte` of each.

The files are strict JSON. Floats are written with full precision; NaN and infinities
are the strings "NaN", "Infinity" and "-Infinity".
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import re
from collections.abc import Callable, Iterable
from typing import Any

from keras_openllama.runs.tensorboard_events import (
    TensorBoardEvents,
    add_path_to_errors,
    scalars_from_record,
)
from keras_openllama.utils import files
from keras_openllama.utils.types import PathLike

METRICS = "metrics.jsonl"
VALIDATION = "validation.jsonl"
SKIPPED = "skipped.jsonl"
SAMPLES = "samples.txt"
TENSORBOARD = "tensorboard"

_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
_INDENT = b"    "


class RunLog:
    """Writes the log of a run; a resumed run continues it as if never interrupted.

    Opening the log drops the records after the step that the run resumes from, and an
    incomplete last line. Within a step, write everything, call `sync`, and save the
    checkpoint last: then the log has all steps of every checkpoint.

    Only one process of a run opens it. A failed write, as on a full disk, raises,
    because a run must not continue without its log.

    Args:
        directory: Local path; created if it does not exist.
        from_step: Step of the checkpoint that the run resumes from; 0 for a new run.

    Attributes:
        last_step: Last step in `metrics.jsonl`, or `None`.
        last_validation_step: Last step in `validation.jsonl`, or `None`.

    Raises:
        ValueError: if `directory` is remote, or a file in it holds anything but
            records; the message names the file and the line.
        OSError: if the files cannot be written.

    Example:
        >>> with RunLog("runs/3b_v3", from_step=0) as log:
        ...     log.write_record({"step": 1, "loss": 10.4, "tokens": 4194304})
        ...     log.write_record({"kind": "validation", "step": 1, "loss": 9.8})
        ...     log.write_sample("sea", 1, "The captain looked at the sea and said, …")
        ...     log.sync()
        >>> read_metrics("runs/3b_v3")
        [{'step': 1, 'loss': 10.4, 'tokens': 4194304}]
    """

    def __init__(self, directory: PathLike, from_step: int):
        if files.is_remote(directory):
            raise ValueError(
                f"directory={str(directory)!r} is remote. Log to a local directory and "
                "copy it, because lines can be appended to local files only."
            )
        self.directory = str(directory)
        files.make_directory(directory)
        metrics, validation, skipped, samples = (
            files.join(directory, name)
            for name in (METRICS, VALIDATION, SKIPPED, SAMPLES)
        )
        self.last_step = _truncate_after(metrics, from_step, _lines)
        self.last_validation_step = _truncate_after(validation, from_step, _lines)
        _truncate_after(skipped, from_step, _lines)
        _truncate_after(samples, from_step, _entries)
        if from_step > 0 and self.last_step != from_step:
            logging.getLogger(__name__).warning(
                "%s ends at step %s, but the run resumes from step %d. The log will "
                "lack the steps between them.",
                metrics,
                self.last_step or 0,
                from_step,
            )
        # The stack closes all files, even if closing one of them fails.
        self._open = contextlib.ExitStack()
        self._metrics = self._open.enter_context(_AppendOnlyFile(metrics))
        self._validation = self._open.enter_context(_AppendOnlyFile(validation))
        self._skipped = self._open.enter_context(_AppendOnlyFile(skipped))
        self._samples = self._open.enter_context(_AppendOnlyFile(samples))
        self._events = self._open.enter_context(
            TensorBoardEvents(files.join(directory, TENSORBOARD), from_step)
        )

    def write_record(self, record: dict[str, Any]) -> None:
        """Appends a training or validation record to its file and to TensorBoard.

        Args:
            record: Dict with `step`. Values are numbers, NumPy or JAX scalars, strings,
                or dicts of these; `None` values are omitted. A record with
                `"kind": "validation"` goes to `validation.jsonl`, without the kind.

        Raises:
            ValueError: if it has no step, or one not after that of the last record.
            OSError: if it cannot be written.
        """
        record = _to_python(record)
        kind = record.pop("kind", "train")
        if kind not in ("train", "validation"):
            raise ValueError(
                "The kind of a record must be 'validation', or missing. Received: "
                f"kind={kind!r}"
            )
        if type(record.get("step")) is not int:
            raise ValueError(
                "The step of a record must be an int. Received: "
                f"step={record.get('step')!r}"
            )
        training = kind == "train"
        last = self.last_step if training else self.last_validation_step
        if last is not None and record["step"] <= last:
            name = METRICS if training else VALIDATION
            raise ValueError(
                "Steps must be written once and in order. Received: "
                f"step={record['step']}, but {self.directory}/{name} already reaches "
                f"step {last}"
            )
        line = json.dumps(_encode_non_finite(record), allow_nan=False) + "\n"
        (self._metrics if training else self._validation).append(line.encode())
        if training:
            self.last_step = record["step"]
        else:
            self.last_validation_step = record["step"]
        self._events.write_scalars(
            record["step"], scalars_from_record(record, training)
        )

    def write_skipped_step(self, record: dict[str, Any]) -> None:
        """Appends the sequences of a skipped step to `skipped.jsonl`.

        Args:
            record: Dict with `step`, see `write_record`; lists are allowed too.

        Raises:
            OSError: if it cannot be written.
        """
        line = json.dumps(_encode_non_finite(record), allow_nan=False) + "\n"
        self._skipped.append(line.encode())

    def write_sample(self, tag: str, step: int, text: str) -> None:
        """Appends a generated text to `samples.txt` and to TensorBoard.

        Args:
            tag: Name of the prompt, a single line.
            step: Steps done.
            text: The text.

        Raises:
            ValueError: if the tag is not a single line.
            OSError: if it cannot be written.
        """
        if tag.splitlines() != [tag]:
            raise ValueError(f"`tag` must be a single line. Received: tag={tag!r}")
        data = text.encode("utf-8", "backslashreplace")
        lines = [f"step {step}, {tag}".encode(), *data.split(b"\n")]
        # Indented lines cannot be mistaken for the end of an entry.
        data = (b"\n" + _INDENT).join(lines) + b"\n\n"
        self._samples.append(data)
        self._events.write_text(step, tag, text)

    def sync(self) -> None:
        """Syncs all files to disk; call it before a checkpoint is saved."""
        parts = (self._metrics, self._validation, self._skipped, self._samples)
        for part in (*parts, self._events):
            part.sync()

    def close(self) -> None:
        """Flushes TensorBoard's events and closes the files."""
        self._open.close()

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def read_metrics(directory: PathLike) -> list[dict[str, Any]]:
    """Reads the training records of a run, which may still be running.

    Args:
        directory: The run's directory.

    Returns:
        Records in order, see this module; an incomplete last line is ignored.

    Raises:
        FileNotFoundError: if there is no `metrics.jsonl`.
        ValueError: if a line is not a record; the message names it.

    Example:
        >>> losses = [
        ...     record["loss"] for record in read_metrics("runs/3b_v3")
        ... ]  # doctest: +SKIP
    """
    path = files.join(directory, METRICS)
    if not os.path.exists(path):
        raise FileNotFoundError(
            f"{directory} has no {METRICS}. Pass the directory of a run, that is, the "
            "--output of `keras-openllama pretrain`."
        )
    return [record for _, record in _read_lines(path)]


def read_validation(directory: PathLike) -> list[dict[str, Any]]:
    """Reads the validation records of a run, which may still be running.

    Args:
        directory: The run's directory.

    Returns:
        Records in order, see this module; an empty list without validations.

    Raises:
        ValueError: if a line is not a record; the message names it.
    """
    path = files.join(directory, VALIDATION)
    if not os.path.exists(path):
        return []
    return [record for _, record in _read_lines(path)]


def has_validation(directory: PathLike, step: int) -> bool:
    """Returns whether `validation.jsonl` has a record of a step.

    Args:
        directory: The run's directory.
        step: Steps done.

    Returns:
        Whether there is one.
    """
    return any(record["step"] == step for record in read_validation(directory))


def has_sample(directory: PathLike, step: int) -> bool:
    """Returns whether `samples.txt` has a text of a step.

    Args:
        directory: The run's directory.
        step: Steps done.

    Returns:
        Whether there is one.
    """
    path = files.join(directory, SAMPLES)
    if not os.path.exists(path):
        return False
    return any(found == step for found, _ in _entries(path))


def _read_lines(path):
    """Yields each line of a file, as bytes, and the record in it."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                record = json.loads(line, object_hook=_decode_non_finite)
                if not (line.endswith(b"\n") and isinstance(record["step"], int)):
                    raise ValueError("incomplete record")
            except (KeyError, TypeError, ValueError):
                if not file.peek(1):
                    return  # The last line may be incomplete, or being written.
                shown = line[:60].decode("utf-8", "backslashreplace")
                raise ValueError(
                    f"{path}, line {number}, is not a JSON object with a step: "
                    f"{shown!r}. Repair or remove the line."
                ) from None
            yield line, record


def _lines(path):
    for line, record in _read_lines(path):
        yield record["step"], line


def _entries(path):
    """Yields the step and the bytes of each complete entry of `samples.txt`."""
    with open(path, "rb") as file:
        *entries, _ = file.read().split(b"\n\n")
    for number, entry in enumerate(entries, 1):
        step = re.match(rb"step (-?\d+), ", entry)
        if not step:
            raise ValueError(
                f"{path}, entry {number}, does not start with 'step N, '. Repair it, "
                "or move the file away."
            )
        yield int(step[1]), entry + b"\n\n"


def _truncate_after(
    path: str,
    from_step: int,
    read_parts: Callable[[str], Iterable[tuple[int, bytes]]],
) -> int | None:
    """Drops parts of a file whose step is later; returns the last step that remains."""
    last = None
    if not os.path.exists(path):
        return last
    with files.atomic_write(path) as unfinished, open(unfinished, "wb") as truncated:
        for step, part in read_parts(path):
            if step <= from_step:
                truncated.write(part)
                last = step
    return last


class _AppendOnlyFile:
    """A file to which data is appended; killing the process loses nothing of it."""

    def __init__(self, path):
        self._path = path
        # Unbuffered: a failure is raised at once, and nothing is written later.
        self._file = open(path, "ab", buffering=0)

    def append(self, data):
        rest = memoryview(data)
        with add_path_to_errors(self._path):
            while rest:  # A nearly full disk writes only a part at first.
                rest = rest[self._file.write(rest) :]

    def sync(self):
        with add_path_to_errors(self._path):
            os.fsync(self._file.fileno())

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._file.close()


def _to_python(value):
    """Converts NumPy and JAX scalars to Python numbers, and drops `None` values."""
    if isinstance(value, dict):
        return {key: _to_python(v) for key, v in value.items() if v is not None}
    return value.item() if hasattr(value, "item") else value


def _encode_non_finite(value):
    if isinstance(value, dict):
        return {key: _encode_non_finite(v) for key, v in value.items()}
    if not isinstance(value, float) or math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _decode_non_finite(record):
    return {
        key: _NOT_FINITE.get(value, value) if isinstance(value, str) else value
        for key, value in record.items()
    }
