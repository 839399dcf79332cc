"""Measures the time of work on a device."""

import statistics
import time


def median_seconds(run, rounds=3):
    """The median time of a call in seconds, after one call that is not timed.

    Args:
        run: function that returns when the device has finished.
        rounds: int, number of timed calls.
    """
    run()
    return statistics.median(seconds(run) for _ in range(rounds))


def seconds(run):
    """The time of one call in seconds."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
