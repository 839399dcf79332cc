"""Best-fit packing: documents share rows, and none is cut that fits into one.

A row of `length` predictions holds `length + 1` tokens. A document of n tokens makes
n - 1 predictions, and takes n tokens of a row.
"""

import numpy as np

from keras_openllama.utils.bin_packing import best_fit_decreasing


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
    rows = best_fit_decreasing(sizes, length + 1)
    order = np.argsort(rows, kind="stable")
    count = int(rows.max()) + 1 if len(rows) else 0
    return count, rows[order], documents[order], starts[order], sizes[order]
