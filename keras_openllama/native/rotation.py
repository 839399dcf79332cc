"""Rotary position embedding by the compiled function `rotation.c`."""

from __future__ import annotations

import ctypes
from pathlib import Path

from keras_openllama.native.heads import Heads, HeadsStructure, load_library


class _Rotation(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("sequences", "heads", "length")),
        ("head_dim", ctypes.c_int64),
        ("threads", ctypes.c_int64),
        ("cosines", ctypes.c_void_p),
        ("sines", ctypes.c_void_p),
        ("table_sequence", ctypes.c_int64),
        ("direction", ctypes.c_float),
        ("source", HeadsStructure),
        ("target", HeadsStructure),
    )


def rotate_heads(
    library: Path,
    source: Heads,
    target: Heads,
    sizes: tuple[int, int, int, int],
    tables: tuple[int, int],
    is_table_shared: bool,
    threads: int,
    direction: float = 1.0,
) -> None:
    """Rotates each head by the angles of its position, in the half-split layout.

    Args:
        library: path of a library that contains `rotation.c`.
        source: the tensor to read.
        target: the tensor to write.
        sizes: sequences, heads, length and head_dim.
        tables: addresses of the cosines and sines, float32
            `(sequences or 1, length, head_dim / 2)`.
        is_table_shared: whether the tables are for all sequences.
        threads: number of threads to use at most.
        direction: 1, or -1 to rotate back.
    """
    _, _, length, head_dim = sizes
    rotation = _Rotation(
        *sizes,
        threads,
        *tables,
        0 if is_table_shared else length * head_dim // 2,
        direction,
        HeadsStructure.of(source),
        HeadsStructure.of(target),
    )
    load_library(library).rotate_heads(ctypes.byref(rotation))
