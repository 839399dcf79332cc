"""Document packing: best-fit-decreasing bin packing of documents into sequences.

No document is cut that fits into a sequence. A sequence of `sequence_length`
predictions holds `sequence_length + 1` tokens. A document of n tokens makes n - 1
predictions, and takes n tokens of a sequence.
"""

import numpy as np
from numpy.typing import ArrayLike

from keras_openllama.utils.bin_packing import best_fit_decreasing


def split_long_documents(
    lengths: ArrayLike, sequence_length: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Splits documents that are longer than a sequence into pieces.

    Each piece except the last fills a sequence. A piece starts with the last token of
    the piece before it, so every token except the first of a document is predicted
    once.

    Args:
        lengths: ints `(documents,)`, tokens of each document.
        sequence_length: predictions per sequence.

    Returns:
        Three int64 arrays with one entry per piece: the index of the document, the
        first token, and the number of tokens.

    Example:
        >>> documents, starts, sizes = split_long_documents([3, 8], sequence_length=4)
        >>> list(zip(documents.tolist(), starts.tolist(), sizes.tolist()))
        [(0, 0, 3), (1, 0, 5), (1, 4, 4)]
    """
    predictions = np.maximum(np.asarray(lengths, "int64") - 1, 0)
    counts = -(-predictions // sequence_length)
    documents = np.repeat(np.arange(len(predictions)), counts)
    within = np.arange(len(documents)) - np.repeat(np.cumsum(counts) - counts, counts)
    starts = within * sequence_length
    sizes = np.minimum(predictions[documents] - starts, sequence_length) + 1
    return documents, starts, sizes


def pack_documents(
    lengths: ArrayLike, sequence_length: int
) -> tuple[int, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Packs documents into sequences.

    Args:
        lengths: ints `(documents,)`, tokens of each document.
        sequence_length: predictions per sequence.

    Returns:
        The number of sequences, and four int64 arrays with one entry per piece, sorted
        by sequence: the index of the sequence, the index of the document, the first
        token, and the number of tokens.

    Example:
        >>> count, sequences, documents, *_ = pack_documents([3, 4, 2], 5)
        >>> count, sequences.tolist(), documents.tolist()
        (2, [0, 0, 1], [1, 2, 0])
    """
    documents, starts, sizes = split_long_documents(lengths, sequence_length)
    sequences = best_fit_decreasing(sizes, sequence_length + 1)
    order = np.argsort(sequences, kind="stable")
    count = int(sequences.max()) + 1 if len(sequences) else 0
    return count, sequences[order], documents[order], starts[order], sizes[order]
