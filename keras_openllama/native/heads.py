"""Tensors of attention heads as the C functions take them."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple


class Heads(NamedTuple):
    """A float32 tensor `(sequences, heads, length, head_dim)` in memory.

    Attributes:
        address: address of the first element.
        strides: number of elements from one sequence, head and position to the next.
            The elements of a head are contiguous.
    """

    address: int
    strides: Sequence[int]


class HeadsStructure(ctypes.Structure):
    """`Heads` of `heads.h`."""

    _fields_ = (("data", ctypes.c_void_p), ("strides", ctypes.c_int64 * 3))

    @classmethod
    def of(cls, heads: Heads) -> HeadsStructure:
        """Returns the structure of a tensor."""
        return cls(heads.address, (ctypes.c_int64 * 3)(*heads.strides))


@functools.cache
def load_library(path: Path) -> ctypes.CDLL:
    """Returns a compiled library, loaded once."""
    return ctypes.CDLL(str(path))
