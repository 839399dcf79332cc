"""The marker file of a training checkpoint: its metadata, and checksums of its files.

`runs.checkpoint_manager` writes the marker after all other files of a checkpoint.
`runs.checkpoint_manager` and `training_run` read it.
"""

import hashlib
import json
from collections.abc import Callable
from typing import Any

from keras_openllama.utils.types import PathLike

MARKER = "checkpoint.json"
FORMAT = 1
_CHECKSUM_KEY = "sha256"  # Of the rest of the marker.


def add_checksum(marker: dict[str, Any]) -> dict[str, Any]:
    """Returns a copy of a marker with a checksum of its contents.

    Args:
        marker: JSON object with `format`, `step`, `files` and other metadata.

    Returns:
        The marker with a SHA-256 checksum under `"sha256"`.

    Example:
        >>> marker = add_checksum({"format": 1, "step": 7, "files": {}})
        >>> parse_marker(json.dumps(marker), "checkpoint.json")
        {'format': 1, 'step': 7, 'files': {}}
    """
    return {**marker, _CHECKSUM_KEY: _checksum(marker)}


def _checksum(marker):
    return hashlib.sha256(json.dumps(marker, sort_keys=True).encode()).hexdigest()


def parse_marker(data: bytes | str, file: PathLike) -> dict[str, Any]:
    """Parses a marker and verifies its checksum.

    Args:
        data: Contents of the file.
        file: Its path, for error messages.

    Returns:
        The marker that was passed to `add_checksum`.

    Raises:
        ValueError: If the marker is damaged or has another format version.
    """
    try:
        marker = json.loads(data)
        checksum = marker.pop(_CHECKSUM_KEY)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is damaged: {error!r}.") from error
    if _checksum(marker) != checksum:
        raise ValueError(f"{file} is damaged (its SHA-256 differs).")
    if marker["format"] != FORMAT:
        raise ValueError(
            f"{file} has format {marker['format']}, and this version reads {FORMAT}."
        )
    return marker


def check_file(
    file: PathLike, expected: dict[str, Any], size: int, sha256: Callable[[], str]
) -> None:
    """Checks a file of a checkpoint against its entry in the marker.

    Args:
        file: Its path, for error messages.
        expected: The entry: `"bytes"` and `"sha256"`.
        size: Size of the file in bytes.
        sha256: Function that returns its SHA-256 in hexadecimal. It is not called if
            the size differs.

    Raises:
        ValueError: If the file is damaged.
    """
    if size != expected["bytes"]:
        raise ValueError(
            f"{file} has {size} bytes, but {expected['bytes']} bytes were written."
        )
    if sha256() != expected["sha256"]:
        raise ValueError(f"{file} is damaged (its SHA-256 differs).")
