"""A Beam worker process on this machine that ends when its parent process ends."""

import os
import sys
import threading
import time

_POLL_SECONDS = 1.0


def _end_with(parent):
    """Ends this process when its parent is gone. A killed parent sends no signal."""
    while os.getppid() == parent:
        time.sleep(_POLL_SECONDS)
    os._exit(1)


def main() -> None:
    """Runs the worker of Beam's SDK."""
    threading.Thread(target=_end_with, args=[os.getppid()], daemon=True).start()
    from apache_beam.runners.worker import sdk_worker_main

    sdk_worker_main.main(sys.argv)


if __name__ == "__main__":
    main()
