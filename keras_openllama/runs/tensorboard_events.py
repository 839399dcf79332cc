"""A run's records as TensorBoard's events, written by the thread that calls."""

import contextlib
import os
import sys
import time

from keras_openllama.utils import files

# Heuristic: how long TensorBoard may lag, and a full disk go unnoticed by its file.
_TENSORBOARD_SECONDS = 30.0


class TensorBoardEvents:
    """Event files, written by the thread that calls.

    tensorboardX's `SummaryWriter` writes in a thread behind a queue of ten. On a full
    disk that thread dies, and once the queue is full the run hangs for ever. So its
    queue is left out; its events and its file are used.
    """

    def __init__(self, directory, from_step):
        with _without_torch():
            from tensorboardX import summary
            from tensorboardX.event_file_writer import EventsWriter
            from tensorboardX.proto import event_pb2, summary_pb2
        self._proto, self._summary, self._text = event_pb2, summary_pb2, summary.text
        self._directory = directory
        files.make_directory(directory)
        # The name ends in a number: two starts within a second would share the rest.
        number = len(os.listdir(directory))
        with naming_file(directory):
            self._writer = EventsWriter(
                os.path.join(directory, "events"), f".{number:04d}"
            )
        # TensorBoard forgets what other files say of this step and later ones.
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._write(from_step + 1, session_log=start)
        self.sync()

    def scalars(self, step, values):
        value = self._summary.Summary.Value
        parts = [value(tag=tag, simple_value=number) for tag, number in values.items()]
        self._write(step, summary=self._summary.Summary(value=parts))

    def text(self, step, tag, text):
        # Markdown would change it; indented it is shown as it is.
        shown = "\n".join("    " + line for line in text.split("\n"))
        shown = shown.encode("utf-8", "backslashreplace").decode()
        self._write(step, summary=self._text(f"samples/{tag}", shown))

    def _write(self, step, **content):
        event = self._proto.Event(wall_time=time.time(), step=step, **content)
        with naming_file(self._directory):
            self._writer.write_event(event)
        if content.get("summary") and time.monotonic() > self._next_sync:
            self.sync()

    def sync(self):
        with naming_file(self._directory):
            self._writer.flush()
        self._next_sync = time.monotonic() + _TENSORBOARD_SECONDS

    def __enter__(self):
        return self

    def __exit__(self, *_):
        with naming_file(self._directory):
            self._writer.close()


@contextlib.contextmanager
def _without_torch():
    """Spares JAX's users PyTorch, which tensorboardX imports if it can: two seconds."""
    if "torch" in sys.modules:
        yield
        return
    sys.modules["torch"] = None  # Python's own way of saying "not importable".
    try:
        yield
    finally:
        del sys.modules["torch"]


@contextlib.contextmanager
def naming_file(path):
    """Lets an `OSError` say which file could not be written."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, path) from error


def scalars_of(record, training):
    """TensorBoard's tags, and the numbers under them."""
    if not training:
        tags = {f"validation/{name}": value for name, value in record.items()}
        for source, values in record.get("sources", {}).items():
            for name, value in values.items():
                tags[f"validation/{name}/{source}"] = value
    else:
        tags = {f"{_group(name)}/{name}": value for name, value in record.items()}
    return {
        tag: value
        for tag, value in tags.items()
        if isinstance(value, (bool, int, float)) and not tag.endswith("/step")
    }


def _group(name):
    if name.endswith("_seconds") or name == "goodput":
        return "time"
    if name.startswith("tokens_per_second") or name == "mfu":
        return "speed"
    return "train"
