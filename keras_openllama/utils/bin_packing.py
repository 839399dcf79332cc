"""Things of different sizes in bins of one size, as few as can be."""

import bisect

import numpy as np


def best_fit(sizes, capacity):
    """Puts things into bins: the largest first, each where it leaves the least room.

    Args:
        sizes: int array `(things,)`, at most `capacity` each.
        capacity: int, what a bin holds.

    Returns:
        int64 array `(things,)`, the number of each thing's bin.

    Source: best-fit decreasing, as for documents in Ding et al., "Fewer truncations
    improve language modeling" (arXiv:2404.10830).
    """
    order = np.argsort(-sizes, kind="stable")
    bins = np.empty(len(sizes), "int64")
    full = int(np.searchsorted(-sizes[order], -capacity, side="right"))
    bins[order[:full]] = np.arange(full)
    count = full
    rooms, owners = [], []  # Free room of the open bins, rising, and their numbers.
    for thing, size in zip(
        order[full:].tolist(), sizes[order[full:]].tolist(), strict=True
    ):
        place = bisect.bisect_left(rooms, size)
        if place == len(rooms):
            bin_, room = count, capacity
            count += 1
        else:
            bin_, room = owners.pop(place), rooms.pop(place)
        bins[thing] = bin_
        if room > size:
            place = bisect.bisect_left(rooms, room - size)
            rooms.insert(place, room - size)
            owners.insert(place, bin_)
    return bins
