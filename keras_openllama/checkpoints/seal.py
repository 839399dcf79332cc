"""The marker of a checkpoint: what is known of it, and what its files have to be.

It is written last, by `runs.checkpoint_manager`, and read there and in `training_run`.
"""

import hashlib
import json

MARKER = "checkpoint.json"
FORMAT = 1
_SEAL = "sha256"  # Of the rest of the marker.


def sealed(marker):
    """A marker with a checksum of itself.

    Args:
        marker: dict, as JSON: `format`, `step`, `files`, and whatever else is known.
    """
    return {**marker, _SEAL: _seal(marker)}


def _seal(marker):
    return hashlib.sha256(json.dumps(marker, sort_keys=True).encode()).hexdigest()


def parse_marker(data, file):
    """The marker that `sealed` made.

    Args:
        data: bytes of the file.
        file: string or path, for messages.

    Raises:
        ValueError: if it is damaged or of another format.
    """
    try:
        marker = json.loads(data)
        seal = marker.pop(_SEAL)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is damaged: {error!r}.") from error
    if _seal(marker) != seal:
        raise ValueError(f"{file} is not what was written (SHA-256 differs).")
    if marker["format"] != FORMAT:
        raise ValueError(
            f"{file} has format {marker['format']}, and this version reads {FORMAT}."
        )
    return marker


def check_file(file, expected, size, sha256):
    """Compares a file of a checkpoint with what the marker says of it.

    Args:
        file: string or path, for messages.
        expected: dict of `"bytes"` and `"sha256"`.
        size: int, bytes of the file.
        sha256: function that returns its SHA-256; not called if the size is wrong.

    Raises:
        ValueError: if the file is not what was written.
    """
    if size != expected["bytes"]:
        raise ValueError(
            f"{file} has {size} bytes, and {expected['bytes']} were written."
        )
    if sha256() != expected["sha256"]:
        raise ValueError(f"{file} is not what was written (SHA-256 differs).")
