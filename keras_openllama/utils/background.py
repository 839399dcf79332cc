"""Functions that run in a thread which does not keep the process alive."""

import concurrent.futures
import threading


def run_in_background(function, *arguments):
    """Calls a function in a daemon thread.

    Unlike the threads of an executor, the thread does not keep the process from ending:
    for calls that may hang.

    Args:
        function: callable.
        *arguments: its arguments.

    Returns:
        `concurrent.futures.Future` of what it returns or raises.

    Example:

    ```python
    saving = run_in_background(save, checkpoint)
    saving.done()
    saving.result()  # Waits, and raises the error of `save`.
    ```
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
