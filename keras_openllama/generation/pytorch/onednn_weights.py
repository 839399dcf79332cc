"""Products in bfloat16 for decoding on CPUs with PyTorch: with oneDNN, and without.

For a single row, PyTorch's own product reads the weights at the rate of the memory, and
oneDNN's at less than half of it (`benchmarks/README.md`).

oneDNN multiplies pairs of rows at once. With weights in the usual layout it rearranges
them in every product. Weights that are packed once make decoding of several sequences
1.7 to 2.5 times as fast, but need memory for a second copy of the weights.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import warnings
from collections.abc import Iterator

import torch

from keras_openllama.utils.host_memory import free_memory


class _Switch:
    """Whether oneDNN is enabled, and how many need it to be disabled."""

    lock = threading.Lock()
    users = 0
    before = True


@contextlib.contextmanager
def without_onednn() -> Iterator[None]:
    """Disables oneDNN, for the whole process.

    Products of other threads are slower in the meantime, and as exact.

    Example:
        >>> with without_onednn():
        ...     torch.backends.mkldnn.enabled
        False
    """
    onednn = torch.backends.mkldnn
    with _Switch.lock:
        if not _Switch.users:
            _Switch.before = onednn.enabled
        _Switch.users += 1
        onednn.enabled = False
    try:
        yield
    finally:
        with _Switch.lock:
            _Switch.users -= 1
            if not _Switch.users:
                onednn.enabled = _Switch.before


class PackedWeights:
    """Packed copies of kernels, which are made again when values change.

    Example:
        >>> import torch
        >>> packed = PackedWeights()
        >>> packed.update([torch.ones(2, 3)])  # Not in bfloat16.
        >>> len(packed)
        0
    """

    def __init__(self) -> None:
        self._packed = {}  # Version of the kernel and packed kernel, by its address.

    def __len__(self) -> int:
        return len(self._packed)

    def get(self, kernel: torch.Tensor) -> torch.Tensor | None:
        """Returns the packed copy of a kernel, or `None`."""
        version, packed = self._packed.get(kernel.data_ptr(), (None, None))
        return packed if version == kernel._version else None

    def update(self, kernels: list[torch.Tensor]) -> None:
        """Packs kernels that profit, and drops the copies of all others.

        If there is not enough memory for the missing copies, it warns and packs none.

        Args:
            kernels: tensors `(outputs, inputs)`.
        """
        kernels = {x.data_ptr(): x for x in kernels if _is_packable(x)}
        for key in [*self._packed]:
            if key not in kernels or self.get(kernels[key]) is None:
                del self._packed[key]
        missing = {k: x for k, x in kernels.items() if k not in self._packed}
        needed = sum(kernel.nbytes for kernel in missing.values())
        if needed > (free_memory() or 0):
            _warn_of_memory(f"{needed / 1e9:.1f} GB")
            return
        for key, kernel in missing.items():
            packed = torch.ops.mkldnn._reorder_linear_weight(kernel)
            self._packed[key] = kernel._version, packed


def multiply_packed(inputs: torch.Tensor, packed: torch.Tensor) -> torch.Tensor:
    """Returns the product of `(..., inputs)` with a kernel that is packed."""
    return torch.ops.mkldnn._linear_pointwise(inputs, packed, None, "none", [], "")


def _is_packable(weight: torch.Tensor) -> bool:
    return (
        weight.dtype == torch.bfloat16
        and weight.device.type == "cpu"
        and torch.backends.mkldnn.is_available()
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


@functools.cache
def _warn_of_memory(needed: str) -> None:
    warnings.warn(
        f"With {needed} of free memory, generation in bfloat16 would be about 1.5 "
        "times as fast: it would hold a copy of the weights in oneDNN's layout.",
        stacklevel=2,
    )
