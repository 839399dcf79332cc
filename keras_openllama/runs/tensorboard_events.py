"""Writes a run's records as TensorBoard events, in the calling thread."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

from keras_openllama.utils import files
from keras_openllama.utils.types import PathLike

# Heuristic: seconds that TensorBoard may lag behind, and that an error of its file,
# such as a full disk, may go unnoticed.
_TENSORBOARD_SECONDS = 30.0


class TensorBoardEvents:
    """TensorBoard event files, written in the calling thread.

    tensorboardX's `SummaryWriter` writes in a thread behind a queue of ten events. On a
    full disk that thread dies, and the run hangs as soon as the queue is full. This
    class uses tensorboardX's events and its file writer without the queue.

    Args:
        directory: Directory of the event files; created if it does not exist.
        from_step: Step of the checkpoint that the run resumes from. TensorBoard
            discards later steps of other files in the directory.

    Raises:
        OSError: if a file cannot be written.
    """

    def __init__(self, directory: PathLike, from_step: int):
        with _without_torch():
            from tensorboardX import summary
            from tensorboardX.event_file_writer import EventsWriter
            from tensorboardX.proto import event_pb2, summary_pb2
        self._proto, self._summary, self._text = event_pb2, summary_pb2, summary.text
        self._directory = directory
        files.make_directory(directory)
        # A number makes the name unique: two starts within a second share the rest.
        number = len(os.listdir(directory))
        with add_path_to_errors(directory):
            self._writer = EventsWriter(
                os.path.join(directory, "events"), f".{number:04d}"
            )
        # On a START event, TensorBoard discards this step and later ones.
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._write(from_step + 1, session_log=start)
        self.sync()

    def write_scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Writes scalars.

        Args:
            step: Steps done.
            values: Scalars by tag.
        """
        value = self._summary.Summary.Value
        parts = [value(tag=tag, simple_value=number) for tag, number in values.items()]
        self._write(step, summary=self._summary.Summary(value=parts))

    def write_text(self, step: int, tag: str, text: str) -> None:
        """Writes a text under `samples/`.

        Args:
            step: Steps done.
            tag: Name of the text.
            text: The text, shown verbatim.
        """
        # TensorBoard renders Markdown; an indented block is shown verbatim.
        shown = "\n".join("    " + line for line in text.split("\n"))
        shown = shown.encode("utf-8", "backslashreplace").decode()
        self._write(step, summary=self._text(f"samples/{tag}", shown))

    def _write(self, step, **content):
        event = self._proto.Event(wall_time=time.time(), step=step, **content)
        with add_path_to_errors(self._directory):
            self._writer.write_event(event)
        if content.get("summary") and time.monotonic() > self._next_sync:
            self.sync()

    def sync(self) -> None:
        """Flushes the events to the file."""
        with add_path_to_errors(self._directory):
            self._writer.flush()
        self._next_sync = time.monotonic() + _TENSORBOARD_SECONDS

    def __enter__(self) -> TensorBoardEvents:
        return self

    def __exit__(self, *error: object) -> None:
        with add_path_to_errors(self._directory):
            self._writer.close()


@contextlib.contextmanager
def _without_torch():
    """Prevents tensorboardX from importing PyTorch, which takes two seconds."""
    if "torch" in sys.modules:
        yield
        return
    sys.modules["torch"] = None  # Makes `import torch` raise `ImportError`.
    try:
        yield
    finally:
        del sys.modules["torch"]


@contextlib.contextmanager
def add_path_to_errors(path: PathLike) -> Iterator[None]:
    """Adds a path to the `OSError`s of a block.

    Args:
        path: The file or directory that the block writes to.

    Raises:
        OSError: the error of the block, with `path` as its `filename`.
    """
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, path) from error


def scalars_from_record(record: Mapping[str, Any], training: bool) -> dict[str, float]:
    """Returns the numbers of a record by TensorBoard tag.

    Args:
        record: A training or validation record, see `metrics_log`.
        training: Whether it is a training record.

    Returns:
        Scalars by tag.

    Example:
        >>> scalars_from_record({"step": 1, "loss": 2.5, "mfu": 0.3}, training=True)
        {'train/loss': 2.5, 'speed/mfu': 0.3}
    """
    if not training:
        tags = {f"validation/{name}": value for name, value in record.items()}
        for source, values in record.get("sources", {}).items():
            for name, value in values.items():
                tags[f"validation/{name}/{source}"] = value
    else:
        tags = {f"{_tag_group(name)}/{name}": value for name, value in record.items()}
    return {
        tag: value
        for tag, value in tags.items()
        if isinstance(value, (bool, int, float)) and not tag.endswith("/step")
    }


def _tag_group(name):
    if name.endswith("_seconds") or name == "goodput":
        return "time"
    if name.startswith("tokens_per_second") or name == "mfu":
        return "speed"
    return "train"
