"""Best-fit packing: documents share rows, and none is cut that fits into one.

A row of `length` predictions holds `length + 1` tokens. A document of n tokens makes
n - 1 predictions, and takes n tokens of a row.
"""

import bisect

import numpy as np


def pieces(lengths, length):
    """Cuts documents that are longer than a row.

    Each piece but the last fills a row, and begins with the token that the one before
    ends with, so that every token but a document's first is predicted once.

    Args:
        lengths: int array `(documents,)`, tokens of each.
        length: int, predictions a row makes.

    Returns:
        Three int64 arrays, one entry per piece: number of the document, first token,
        tokens.
    """
    predictions = np.maximum(np.asarray(lengths, "int64") - 1, 0)
    counts = -(-predictions // length)
    documents = np.repeat(np.arange(len(predictions)), counts)
    within = np.arange(len(documents)) - np.repeat(np.cumsum(counts) - counts, counts)
    starts = within * length
    sizes = np.minimum(predictions[documents] - starts, length) + 1
    return documents, starts, sizes


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


def pack(lengths, length):
    """The rows that documents make.

    Args:
        lengths: int array `(documents,)`, tokens of each.
        length: int, predictions a row makes.

    Returns:
        Number of rows, and four int64 arrays, one entry per piece, in the order of the
        rows: row, number of the document, first token, tokens.
    """
    documents, starts, sizes = pieces(lengths, length)
    rows = best_fit(sizes, length + 1)
    order = np.argsort(rows, kind="stable")
    count = int(rows.max()) + 1 if len(rows) else 0
    return count, rows[order], documents[order], starts[order], sizes[order]
