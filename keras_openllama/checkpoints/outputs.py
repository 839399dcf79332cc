"""The files that are going to be written: planned first, written one by one."""

import dataclasses
from collections.abc import Callable


@dataclasses.dataclass(frozen=True)
class Output:
    """A file to be.

    Attributes:
        name: string, its path in the target directory.
        size: int, its bytes.
        write: function `(file, values)` that writes it to an open file; `values` is an
            iterator of NumPy arrays.
        tensors: tuple of the variable paths whose values it takes, in order.
    """

    name: str
    size: int
    write: Callable
    tensors: tuple = ()


def small_file(name, data):
    """An `Output` whose contents, bytes or a string, are known already."""
    data = data.encode("utf-8") if isinstance(data, str) else data

    return Output(name, len(data), lambda file, values: file.write(data))
