"""Results of a part: lines of JSON on its standard output."""

import json
import os

import workers  # benchmarks/workers.py

LIMITS = "limits.json"
_state = {}


def start(part, directory):
    """Starts the process of a part, before Keras is imported.

    Args:
        part: `parts.Part`.
        directory: path that all parts share.
    """
    _, _state["answers"] = workers.start_worker(f"{part.name}/{part.backend}")
    _state["directory"] = directory


def directory():
    """The directory that all parts share."""
    return _state["directory"]


def has_gpu():
    """Whether there is a GPU, and sizes are full."""
    return os.environ["GPU_CHECK_HAS_GPU"] == "1"


def check(name, value, limit, note=""):
    """Reports a check, which passes if `value <= limit`. NaN fails."""
    kind = "passed" if value <= limit else "failed"
    emit(kind=kind, name=name, value=float(value), limit=float(limit), note=note)


def measure(name, value, unit, note=""):
    """Reports a measurement."""
    emit(kind="measured", name=name, value=float(value), unit=unit, note=note)


def info(name, note):
    """Reports a text."""
    emit(kind="info", name=name, note=str(note))


def skip(name, reason):
    """Reports that a check did not run."""
    emit(kind="skipped", name=name, note=reason)


def emit(**result):
    """Writes a result."""
    print(json.dumps(result), file=_state["answers"], flush=True)


# ----- The limits of the device


def save_limits(**values):
    """Saves the fastest rates that were measured, for `limit_of`."""
    path = directory() / LIMITS
    known = json.loads(path.read_text()) if path.exists() else {}
    for name, value in values.items():
        known[name] = max(value, known.get(name, 0.0))
    path.write_text(json.dumps(known))


def limit_of(name):
    """A rate of `save_limits`, or `None` if its part did not run."""
    path = directory() / LIMITS
    return json.loads(path.read_text()).get(name) if path.exists() else None
