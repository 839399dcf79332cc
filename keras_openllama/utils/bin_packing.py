"""Best-fit-decreasing bin packing."""

from __future__ import annotations

import bisect

import numpy as np
from numpy.typing import NDArray


def best_fit_decreasing(sizes: NDArray[np.integer], capacity: int) -> NDArray[np.int64]:
    """Assigns items to as few bins as this heuristic finds.

    Items are placed in order of decreasing size, each into the bin that it leaves with
    the least free space.

    Args:
        sizes: int array of shape `(items,)`. No item is larger than `capacity`.
        capacity: Size of a bin, in the unit of `sizes`.

    Returns:
        int64 array of shape `(items,)`: the index of each item's bin.

    Example:
        >>> best_fit_decreasing(np.array([6, 5, 4, 3, 2]), capacity=10)
        array([0, 1, 0, 1, 1])

    Source: used for documents in Ding et al., "Fewer truncations improve language
    modeling" (arXiv:2404.10830).
    """
    order = np.argsort(-sizes, kind="stable")
    bins = np.empty(len(sizes), "int64")
    full = int(np.searchsorted(-sizes[order], -capacity, side="right"))
    bins[order[:full]] = np.arange(full)
    count = full
    # Free space of the open bins, in ascending order, and the indices of these bins.
    spaces, indices = [], []
    for item, size in zip(
        order[full:].tolist(), sizes[order[full:]].tolist(), strict=True
    ):
        position = bisect.bisect_left(spaces, size)
        if position == len(spaces):
            index, space = count, capacity
            count += 1
        else:
            index, space = indices.pop(position), spaces.pop(position)
        bins[item] = index
        if space > size:
            position = bisect.bisect_left(spaces, space - size)
            spaces.insert(position, space - size)
            indices.insert(position, index)
    return bins
