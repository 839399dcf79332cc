"""What a part has found: lines of JSON on its standard output."""

import json
import os

import workers  # benchmarks/workers.py

CEILINGS = "ceilings.json"
_state = {}


def begin(part, directory):
    """In a part's process, before anything imports Keras.

    Args:
        part: `parts.Part`.
        directory: path, common to all parts of a check.
    """
    _, _state["answers"] = workers.begin(f"{part.name}/{part.backend}")
    _state["directory"] = directory


def directory():
    """The directory that all parts of a check share."""
    return _state["directory"]


def has_gpu():
    """Whether this is a check of a GPU, at full size."""
    return os.environ["GPU_CHECK_HAS_GPU"] == "1"


def check(name, value, limit, note=""):
    """Passes if `value <= limit`; a value that is not a number fails."""
    kind = "passed" if value <= limit else "failed"
    emit(kind=kind, name=name, value=float(value), limit=float(limit), note=note)


def measure(name, value, unit, note=""):
    """A number that nothing depends on."""
    emit(kind="measured", name=name, value=float(value), unit=unit, note=note)


def tell(name, note):
    """A fact in words."""
    emit(kind="told", name=name, note=str(note))


def skip(name, reason):
    emit(kind="skipped", name=name, note=reason)


def emit(**result):
    print(json.dumps(result), file=_state["answers"], flush=True)


# ----- What the device can do


def keep_ceilings(**values):
    """Keeps the fastest rates that parts have measured, for `ceiling`."""
    path = directory() / CEILINGS
    known = json.loads(path.read_text()) if path.exists() else {}
    for name, value in values.items():
        known[name] = max(value, known.get(name, 0.0))
    path.write_text(json.dumps(known))


def ceiling(name):
    """A rate that `keep_ceilings` kept; `None` if its part did not run."""
    path = directory() / CEILINGS
    return json.loads(path.read_text()).get(name) if path.exists() else None
