"""Runs the server: a socket, uvicorn, and the end after SIGTERM."""

from __future__ import annotations

import collections
import signal
import socket
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

import uvicorn

from keras_openllama.generation.sampling.config import SamplingConfig

if TYPE_CHECKING:
    from starlette.applications import Starlette

    from keras_openllama.generation.continuous_batching.engine import Engine

BACKLOG = 1024  # Connections that wait to be accepted.
KEEP_ALIVE = 30  # Seconds that a connection may be idle.


def open_socket(host: str, port: int) -> socket.socket:
    """Binds a socket, before the model is loaded: loading takes time.

    Args:
        host: Name or address of an interface.
        port: The port; 0 for a free one.

    Raises:
        ValueError: If the address is not available.

    Example:
        >>> with open_socket("127.0.0.1", 0) as opened:
        ...     opened.getsockname()[0]
        '127.0.0.1'
    """
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        # A server that ended a moment ago may still have the port.
        return socket.create_server(address[:2], family=family, backlog=BACKLOG)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ValueError(
            f"`host`={host} and `port`={port} are not available: {reason}. Choose "
            "others."
        ) from error


def address_of(opened: socket.socket) -> str:
    """Returns the address of a server for clients on the same machine.

    Example:
        >>> with open_socket("127.0.0.1", 0) as opened:
        ...     address_of(opened)[:17]
        'http://127.0.0.1:'
    """
    host, port = opened.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def warm_up(engine: Engine, num_slots: int) -> None:
    """Compiles the programs that requests need, so that they do not wait for it.

    Args:
        engine: The engine, which is started.
        num_slots: Its number of slots. There is a program for each power of two, and
            for adapters of other ranks or layers.
    """
    from keras_openllama.generation.continuous_batching.engine import EngineRequest

    sizes = {min(2**i, num_slots) for i in range(num_slots.bit_length() + 1)}
    for adapter in (None, *engine.adapter_names):
        request = EngineRequest([1] * 8, 2, SamplingConfig(), adapter=adapter)
        for size in sorted(sizes):
            for events in [engine.stream(request) for _ in range(size)]:
                collections.deque(events, maxlen=0)


class Server(uvicorn.Server):
    """Serves an application until SIGTERM or SIGINT.

    After the signal it accepts no connections, completes the requests that run, for
    at most `drain_time` seconds, and stops the engine.

    Args:
        app: Result of `app.make_app`.
        engine: The engine of the application.
        opened: The socket.
        drain_time: Seconds.
        access_log: Whether each request is logged.
        on_ready: Called when the server accepts connections.
    """

    def __init__(
        self,
        app: Starlette,
        engine: Engine,
        opened: socket.socket,
        drain_time: int = 30,
        access_log: bool = True,
        on_ready: Callable[[], None] = lambda: None,
    ) -> None:
        config = uvicorn.Config(
            app,
            # The implementations that are always installed.
            http="h11",
            loop="asyncio",
            ws="none",
            lifespan="off",
            log_level="info" if access_log else "warning",
            server_header=False,
            backlog=BACKLOG,
            timeout_keep_alive=KEEP_ALIVE,
            timeout_graceful_shutdown=drain_time,
        )
        super().__init__(config)
        self._engine = engine
        self._socket = opened
        self._on_ready = on_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Starts to accept connections."""
        await super().startup(sockets)
        self._on_ready()

    def serve_until_signal(self) -> None:
        """Blocks until the server has ended."""
        if threading.current_thread() is threading.main_thread():
            # uvicorn raises the signal again at its end.
            signal.signal(signal.SIGTERM, lambda *_: None)
        self._engine.start()
        try:
            self.run(sockets=[self._socket])
        finally:
            self._engine.shutdown(drain=False)
