"""A server in a thread of the test, with a model on a free port."""

import contextlib
import threading
import time

from keras_openllama.generation.continuous_batching.engine import Engine
from keras_openllama.serving.app import make_app
from keras_openllama.serving.served_model import ServedModel
from keras_openllama.serving.server import Server, address_of, open_socket
from keras_openllama.serving.settings import ServerSettings


class RunningServer:
    """A server that runs.

    Attributes:
        url: its address, without a slash at the end.
        engine: its engine.
    """

    def __init__(self, lm, settings=None, **engine_options):
        self.engine = Engine(lm, **{"num_slots": 4, "context": 256} | engine_options)
        model = ServedModel(lm, self.engine, "nano")
        socket = open_socket("127.0.0.1", 0)
        self.url = address_of(socket)
        app = make_app(model, settings or ServerSettings())
        ready = threading.Event()
        self.server = Server(
            app, self.engine, socket, access_log=False, on_ready=ready.set
        )
        self.thread = threading.Thread(target=self.server.serve_until_signal)
        self.thread.start()
        assert ready.wait(60)

    def stop(self):
        self.server.should_exit = True
        self.thread.join(60)
        assert not self.thread.is_alive()

    def wait_until_idle(self, seconds=30):
        """Waits until no slot is in use."""
        deadline = time.monotonic() + seconds
        while self.engine.stats.active or self.engine.stats.queued:
            assert time.monotonic() < deadline, self.engine.stats
            time.sleep(0.01)


@contextlib.contextmanager
def running_server(lm, settings=None, **engine_options):
    server = RunningServer(lm, settings, **engine_options)
    try:
        yield server
    finally:
        server.stop()
