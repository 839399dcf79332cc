"""Files that a thread writes to, so that the next part is made ready meanwhile."""

import contextlib
import os
import queue
import threading

_PARTS_AHEAD = 4  # Ours: parts have some MB each.


@contextlib.contextmanager
def open_in_background(path):
    """Opens a file for writing; yields what has its `write`, `seek` and `truncate`.

    At the end the file is on the disk.

    What is written must not change afterwards. An error of the thread is raised by the
    call after it, or at the end.

    Args:
        path: path of the file.

    Raises:
        OSError: if the file cannot be opened or written.

    Example:

    ```python
    with open_in_background("numbers") as file:
        file.write(bytes(1000))
    ```
    """
    with open(path, "wb") as file:
        writer = _Writer(file)
        try:
            yield writer
        finally:
            writer.finish()
        writer.check()
        # Here, where a progress bar still shows that something goes on.
        file.flush()
        os.fsync(file.fileno())


class _Writer:
    """Hands calls to a thread, a few at a time."""

    def __init__(self, file):
        self._calls = queue.Queue(_PARTS_AHEAD)
        self._error = None
        self._thread = threading.Thread(target=self._run, args=(file,), daemon=True)
        self._thread.start()

    def write(self, data):
        self._call("write", data)

    def seek(self, position):
        self._call("seek", position)

    def truncate(self, size):
        self._call("truncate", size)

    def check(self):
        """Raises the error of the thread, if there was one."""
        if self._error is not None:
            raise self._error

    def finish(self):
        """Waits until all is written, or has failed."""
        self._calls.put(None)
        self._thread.join()

    def _call(self, *call):
        self.check()
        self._calls.put(call)

    def _run(self, file):
        while (call := self._calls.get()) is not None:
            if self._error is not None:
                continue  # What is left is taken, or the caller would wait for ever.
            try:
                name, argument = call
                getattr(file, name)(argument)
            except BaseException as error:
                self._error = error
