"""Descriptions of the files that an export writes, made before any is written."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

import numpy as np

from keras_openllama.checkpoints.tensors import ReadableTensor


def _array(tensor: ReadableTensor) -> np.ndarray:
    return tensor.array()


@dataclasses.dataclass(frozen=True)
class OutputFile:
    """A file that an export is going to write.

    Attributes:
        name: Its path in the target directory.
        size: Its size in bytes.
        write: Function `(file, values)` that writes the contents to an open binary
            file. `values` iterates over what `read` returns, for each of `tensors`.
        tensors: The variable paths of the weights that the file holds, in the order
            in which they are written.
        read: Function that returns the value of a tensor, as a NumPy array by default.
    """

    name: str
    size: int
    write: Callable[[BinaryIO, Iterator[Any]], Any]
    tensors: tuple[str, ...] = ()
    read: Callable[[ReadableTensor], Any] = _array


def small_file(name: str, data: bytes | str) -> OutputFile:
    """Returns an `OutputFile` whose contents are already in memory.

    Args:
        name: Its path in the target directory.
        data: The contents. A string is encoded as UTF-8.

    Returns:
        The file, which holds no tensors.

    Example:
        >>> small_file("config.json", "{}").size
        2
    """
    data = data.encode("utf-8") if isinstance(data, str) else data

    return OutputFile(name, len(data), lambda file, values: file.write(data))
