"""Responses that end when their client leaves, among them server-sent events."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from keras_openllama.serving.errors import ApiError

_T = TypeVar("_T")
_HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",  # Proxies such as nginx pass events on at once.
}


def event(data: dict[str, Any]) -> bytes:
    r"""Returns the text of an event.

    Example:
        >>> event({"a": 1})
        b'data: {"a":1}\n\n'

    Source: https://html.spec.whatwg.org/multipage/server-sent-events.html
    """
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    # A line end within a string of JSON is escaped.
    return f"data: {text}\n\n".encode()


async def until_disconnect(receive: Receive, work: Awaitable[_T]) -> _T:
    """Waits for a result, and cancels the work if the client leaves.

    Args:
        receive: The `receive` of ASGI, after the body was read.
        work: What to wait for.

    Returns:
        The result of `work`.

    Raises:
        ClientDisconnect: If the client left before.
    """
    working = asyncio.ensure_future(work)
    listening = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait((working, listening), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        for task in (working, listening):
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await task


async def _disconnected(receive):
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream:
    """A response of server-sent events, an application of ASGI.

    An error after the first event becomes an event with OpenAI's error body.

    Args:
        events: The data of the events. It is closed when the client leaves.
        time_limit: Seconds until the stream must end.
        on_end: Called with whether the client left before the end.
    """

    status_code = 200

    def __init__(
        self,
        events: AsyncIterator[dict[str, Any]],
        time_limit: float,
        on_end: Callable[[bool], None],
    ) -> None:
        self._events = events
        self._time_limit = time_limit
        self._on_end = on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the events."""
        is_complete = False
        try:
            await until_disconnect(receive, self._send_all(send))
            is_complete = True
        except (ClientDisconnect, OSError):
            pass
        finally:
            self._on_end(not is_complete)

    async def _send_all(self, send):
        headers = [(k.encode(), v.encode()) for k, v in _HEADERS.items()]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        try:
            # The limit includes the time of a client that reads slowly.
            async with asyncio.timeout(self._time_limit):
                async for data in self._events:
                    await _send_body(send, event(data))
        except TimeoutError:
            await _send_body(send, event(time_limit_error(self._time_limit).body()))
        except ApiError as error:
            await _send_body(send, event(error.body()))
        await _send_body(send, b"data: [DONE]\n\n", more=False)


async def _send_body(send, body, more=True):
    await send({"type": "http.response.body", "body": body, "more_body": more})


def time_limit_error(seconds: float) -> ApiError:
    """Returns the error of a request that takes too long.

    Example:
        >>> time_limit_error(60).message
        'The request took longer than 60 s. Ask for fewer tokens.'
    """
    return ApiError(
        f"The request took longer than {seconds:g} s. Ask for fewer tokens.",
        status=504,
        code="timeout",
    )
