"""Functions that run in a daemon thread."""

from __future__ import annotations

import concurrent.futures
import threading
from collections.abc import Callable
from typing import Any


def run_in_background(
    function: Callable[..., Any], *arguments: Any
) -> concurrent.futures.Future[Any]:
    """Calls a function in a daemon thread.

    Unlike the threads of an executor, it does not keep the process alive: for calls
    that may hang.

    Args:
        function: The function to call.
        *arguments: Its arguments.

    Returns:
        Future of what the function returns or raises.

    Example:
        >>> future = run_in_background(pow, 2, 10)
        >>> future.result()  # Waits, and raises the error of the function.
        1024
    """
    future = concurrent.futures.Future()
    threading.Thread(
        target=_complete, args=(future, function, arguments), daemon=True
    ).start()
    return future


def _complete(future, function, arguments):
    try:
        result = function(*arguments)
    except BaseException as error:
        future.set_exception(error)
    else:
        future.set_result(result)
