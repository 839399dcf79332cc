"""How LoRA adapters are merged into a kernel, and when saving merges them."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

_saving_merged = contextvars.ContextVar("saving_merged", default=False)


def add_product(
    kernel: NDArray, outputs: NDArray, inputs: NDArray, scale: float
) -> NDArray:
    """Returns `kernel + scale * outputs @ inputs` in float32.

    Args:
        kernel: Array `(outputs, inputs)`.
        outputs: The factor of the outputs, `(outputs, rank)`: PEFT's B.
        inputs: The factor of the inputs, `(rank, inputs)`: PEFT's A.
        scale: The adapters' alpha divided by their rank.

    Returns:
        float32 array of the shape of `kernel`.

    Example:
        >>> add_product(np.zeros((1, 2)), np.ones((1, 1)), np.ones((1, 2)), 0.5)
        array([[0.5, 0.5]], dtype=float32)
    """
    product = outputs.astype("float32") @ inputs.astype("float32")
    return kernel.astype("float32") + np.float32(scale) * product


@contextlib.contextmanager
def saving_merged() -> Iterator[None]:
    """Saves models inside the block with their adapters merged into the kernels.

    A preset is a model without adapters. Everything else that Keras saves has the
    kernels and the adapters apart.

    Example:
        >>> with saving_merged():
        ...     is_saving_merged()
        True
    """
    token = _saving_merged.set(True)
    try:
        yield
    finally:
        _saving_merged.reset(token)


def is_saving_merged() -> bool:
    """Returns whether the caller is inside a block of `saving_merged`."""
    return _saving_merged.get()
