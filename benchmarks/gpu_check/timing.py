"""Seconds of work on a device."""

import statistics
import time


def median_seconds(run, rounds=3):
    """The median time of a call, after one call that is not timed.

    Args:
        run: callable that returns when the device is done.
        rounds: int.
    """
    run()
    return statistics.median(seconds(run) for _ in range(rounds))


def seconds(run):
    """The time of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
