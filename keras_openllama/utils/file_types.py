"""Tells files of models apart by their names and first bytes."""

from __future__ import annotations

from pathlib import Path

from keras_openllama.utils.types import PathLike

GGUF_SUFFIX = ".gguf"
GGUF_MAGIC = b"GGUF"


def is_gguf_file(path: PathLike) -> bool:
    """Returns whether there is a GGUF file at a path, by its suffix or first bytes.

    Example:
        >>> _ = Path("model.bin").write_bytes(b"GGUF")
        >>> is_gguf_file("model.bin"), is_gguf_file("missing.gguf")
        (True, False)
    """
    path = Path(path)
    if not path.is_file():
        return False
    if path.suffix == GGUF_SUFFIX:
        return True
    with open(path, "rb") as file:
        return file.read(len(GGUF_MAGIC)) == GGUF_MAGIC
