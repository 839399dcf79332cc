"""Files that a thread writes to, so that the next part is prepared meanwhile."""

import collections
import concurrent.futures
import contextlib
import os

_PARTS_AHEAD = 4  # Heuristic: parts have some MB each.


@contextlib.contextmanager
def open_in_background(path):
    """Opens a file for writing; yields an object with `write`, `seek` and `truncate`.

    At the end the file is on the disk.

    What is written must not change afterwards. An error of the thread is raised by a
    later call, or at the end.

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
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            writer = _Writer(file, pool)
            yield writer
            writer.wait(parts_left=0)
        # Here, where a progress bar still shows that something goes on.
        file.flush()
        os.fsync(file.fileno())


class _Writer:
    """Hands calls to a thread, a few at a time."""

    def __init__(self, file, pool):
        self._file = file
        self._pool = pool
        self._pending = collections.deque()

    def write(self, data):
        self._call(self._file.write, data)

    def seek(self, position):
        self._call(self._file.seek, position)

    def truncate(self, size):
        self._call(self._file.truncate, size)

    def wait(self, parts_left):
        """Waits until at most so many calls are pending; raises an error of theirs."""
        while self._pending and (
            len(self._pending) > parts_left or self._pending[0].done()
        ):
            self._pending.popleft().result()

    def _call(self, method, argument):
        self.wait(parts_left=_PARTS_AHEAD)
        self._pending.append(self._pool.submit(method, argument))
