"""A server in a process of its own, with open_llama_nano on a free port."""

import contextlib
import os
import re
import subprocess
import sys
import tempfile
import time

import httpx2
import psutil


class ServerProcess:
    """A server that runs.

    Attributes:
        process: its process.
        url: its address, without a slash at the end.
    """

    def __init__(self, process, url):
        self.process, self.url = process, url

    @property
    def resident_bytes(self):
        return psutil.Process(self.process.pid).memory_info().rss

    @property
    def texts(self):
        """How many texts are computed, and how many wait for a slot."""
        text = httpx2.get(f"{self.url}/metrics", timeout=60).text
        names = "running", "waiting"
        return tuple(
            int(re.search(rf"^keras_openllama_requests_{name} (\d+)$", text, re.M)[1])
            for name in names
        )

    def wait_until_idle(self, seconds=30):
        """Waits until no slot is in use."""
        deadline = time.monotonic() + seconds
        while self.texts != (0, 0):
            assert time.monotonic() < deadline, self.texts
            time.sleep(0.05)


@contextlib.contextmanager
def server_process(*options):
    """Runs `keras-openllama serve`."""
    command = [sys.executable, "-m", "keras_openllama", "serve", "--preset", "nano"]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            [*command, "--port", "0", "--no-access-log", *map(str, options)],
            stderr=log,
            env=os.environ | {"KERAS_BACKEND": "jax"},
        )
        try:
            yield ServerProcess(process, _url(process, log))
        finally:
            process.kill()
            process.wait()


def _url(process, log):
    """Waits until the server says where it is."""
    while True:
        is_running = process.poll() is None
        log.seek(0)
        text = log.read()
        found = re.search(r"served at (http://\S+)", text)
        if found:
            return found[1]
        assert is_running, text
        time.sleep(0.1)
