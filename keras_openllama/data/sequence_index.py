"""Index of training sequences: the spans of documents in each sequence.

A sequence of `sequence_length` predictions holds `sequence_length + 1` tokens: inputs
and targets, which are one token ahead. Sequences are numbered through all epochs.
"""

import collections
import logging
import threading
from typing import Any, Protocol, TypeAlias

import numpy as np
from tqdm import tqdm

from keras_openllama.data import document_packing, shuffling
from keras_openllama.data.prepared_data import tokens_per_block
from keras_openllama.data.shuffling import BLOCK
from keras_openllama.utils import files

_CHUNK = 1 << 22  # Documents that are counted at a time.
# A sequence may span two groups while other threads still read the previous group.
_CACHED_GROUPS = 3

_log = logging.getLogger(__name__)

# The index of a document, its first token, and the number of tokens.
Span: TypeAlias = tuple[int, int, int]


class HasLengths(Protocol):
    """Documents whose numbers of tokens are known.

    Attributes:
        lengths: unsigned array `(documents,)`, tokens of each document.
    """

    lengths: Any


class _SequenceIndex:
    """Base class of both ways to make sequences of documents.

    Args:
        documents: `prepared_data.Documents`, or an object with the same `lengths`.
        sequence_length: predictions per sequence.
        key: decides the order, see `shuffling.make_key`.
        totals: int64 array `(blocks,)`: tokens or sequences of each block.

    Attributes:
        sequences_per_epoch: number of sequences per epoch, a float.
    """

    def __init__(
        self, documents: HasLengths, sequence_length: int, key: int, totals: np.ndarray
    ):
        self._documents, self._length = documents, sequence_length
        self._order = shuffling.ShuffledOrder(totals, key)
        self._clear_cache()

    def _clear_cache(self):
        self._groups = collections.OrderedDict()
        self._lock = threading.Lock()  # Several threads read batches.

    def __getstate__(self):
        state = {**self.__dict__}
        del state["_groups"], state["_lock"]
        return state

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._clear_cache()

    def spans(self, index: int) -> list[Span]:
        """Returns the parts of a sequence.

        Args:
            index: index of the sequence.

        Returns:
            Tuples `(document, first token, number of tokens)`.
        """
        with self._lock:
            return self._spans(index)

    def _group(self, epoch, group):
        """Opens a group of blocks; caches the last ones."""
        if (epoch, group) not in self._groups:
            while len(self._groups) >= _CACHED_GROUPS:
                self._groups.popitem(last=False)
            blocks = self._order.blocks(epoch, group)
            key = self._order.group_key(epoch, group)
            self._groups[epoch, group] = self._open(blocks, key)
        return self._groups[epoch, group]

    def _numbers(self, block):
        """Indices of the documents of a block."""
        count = len(self._documents.lengths)
        return np.arange(block * BLOCK, min((block + 1) * BLOCK, count))


class ConcatenatedIndex(_SequenceIndex):
    """Concatenates all documents and cuts every `sequence_length` tokens, as LLaMA did.

    Every token of an epoch is predicted once. The last sequence of an epoch continues
    into the next epoch. The sequences that start in a group are shuffled, so that the
    parts of a long document are spread over many batches.

    Args:
        documents: `prepared_data.Documents`, or an object with the same `lengths`.
        sequence_length: predictions per sequence.
        key: decides the order, see `shuffling.make_key`.

    Attributes:
        sequences_per_epoch: number of sequences per epoch, a float.

    Example:
        >>> from types import SimpleNamespace
        >>> documents = SimpleNamespace(lengths=np.array([12], "uint32"))
        >>> ConcatenatedIndex(documents, sequence_length=4, key=0).spans(0)
        [(0, 4, 5)]
    """

    def __init__(self, documents: HasLengths, sequence_length: int, key: int):
        totals = tokens_per_block(documents.lengths)
        super().__init__(documents, sequence_length, key, totals)
        self.sequences_per_epoch = self._order.total / sequence_length

    def tokens_per_sequence(self) -> float:
        """Mean number of predicted tokens per sequence."""
        return float(self._length)

    def _open(self, blocks, key):
        """Shuffled documents of a group, their ends, and the order of sequences."""
        numbers = np.concatenate([self._numbers(block) for block in blocks.tolist()])
        numbers = numbers[shuffling.permutation(len(numbers), key)]
        ends = np.cumsum(self._documents.lengths[numbers], dtype="int64")
        count = int(ends[-1]) // self._length
        order = shuffling.permutation(count, shuffling.make_key(key, "rows"))
        return numbers, ends, order

    def _shuffled(self, index):
        """The sequence at the position of `index` in the shuffled order."""
        epoch, group, within = self._order.locate(index * self._length)
        order = self._group(epoch, group)[2]
        # The first sequence of a group starts less than a sequence after the group. So
        # the group has `len(order)` sequences, or one more, which stays the last.
        place = within // self._length
        return index + int(order[place]) - place if place < len(order) else index

    def _spans(self, index):
        position, missing = self._shuffled(index) * self._length, self._length + 1
        spans = []
        while missing:
            epoch, group, within = self._order.locate(position)
            numbers, ends, _ = self._group(epoch, group)
            place = int(np.searchsorted(ends, within, side="right"))
            while missing and place < len(ends):
                document, end = int(numbers[place]), int(ends[place])
                start = within - (int(ends[place - 1]) if place else 0)
                size = min(missing, end - within)
                spans.append((document, start, size))
                within, position = within + size, position + size
                missing, place = missing - size, place + 1
        return spans


class BestFitIndex(_SequenceIndex):
    """Packs documents into sequences without cutting those that fit.

    Documents of one block share sequences, the same ones in every epoch. The sequences
    are shuffled. The rest of a sequence is padding. See `document_packing`.

    Args:
        documents: `prepared_data.Documents`, or an object with the same `lengths`.
        sequence_length: predictions per sequence.
        key: decides the order, see `shuffling.make_key`.
        cache: file for the number of sequences of each block, little-endian uint32.
            Without it they are computed in each process.

    Attributes:
        sequences_per_epoch: number of sequences per epoch, a float.

    Example:
        >>> from types import SimpleNamespace
        >>> documents = SimpleNamespace(lengths=np.array([3, 4, 2], "uint32"))
        >>> index = BestFitIndex(documents, sequence_length=5, key=0)
        >>> sorted(index.spans(i) for i in range(2))
        [[(0, 0, 3)], [(1, 0, 4), (2, 0, 2)]]
    """

    def __init__(
        self,
        documents: HasLengths,
        sequence_length: int,
        key: int,
        cache: str | None = None,
    ):
        totals = _sequences_per_block(documents.lengths, sequence_length, cache)
        super().__init__(documents, sequence_length, key, totals.astype("int64"))
        self.sequences_per_epoch = float(self._order.total)

    def tokens_per_sequence(self) -> float:
        """Mean number of predicted tokens per sequence."""
        lengths, tokens = self._documents.lengths, 0
        for start in range(0, len(lengths), _CHUNK):
            predictions = lengths[start : start + _CHUNK].astype("int64") - 1
            # Each piece except a sequence's last predicts the first token of the next.
            pieces = -(-predictions // self._length)
            tokens += int(predictions.sum() + pieces.sum())
        return tokens / self.sequences_per_epoch - 1

    def _open(self, blocks, key):
        """Pieces of the group's documents by sequence, and the sequences' order."""
        pieces, starts, count = [], [np.zeros(1, "int64")], 0
        for block in blocks.tolist():
            numbers = self._numbers(block)
            num_sequences, sequences, documents, firsts, sizes = (
                document_packing.pack_documents(
                    self._documents.lengths[numbers], self._length
                )
            )
            ends = np.searchsorted(sequences, np.arange(num_sequences), side="right")
            pieces.append(np.stack([numbers[documents], firsts, sizes], axis=1))
            starts.append(ends + count)
            count += len(sequences)
        starts = np.concatenate(starts)
        order = shuffling.permutation(len(starts) - 1, key)
        return np.concatenate(pieces), starts, order

    def _spans(self, index):
        epoch, group, within = self._order.locate(index)
        pieces, starts, order = self._group(epoch, group)
        chosen = int(order[within])
        spans = pieces[starts[chosen] : starts[chosen + 1]]
        return [tuple(span) for span in spans.tolist()]


def _sequences_per_block(lengths, sequence_length, cache):
    """Reads the sequences per block from the cache, or computes and caches them."""
    blocks = -(-len(lengths) // BLOCK)
    if cache and files.exists(cache):
        totals = np.frombuffer(files.read_bytes(cache), "<u4")
        if len(totals) == blocks:
            return totals
    totals = np.empty(blocks, "<u4")
    bar = tqdm(
        desc=f"Packing into sequences of {sequence_length} tokens (cached)",
        total=len(lengths),
        unit="document",
        unit_scale=True,
        delay=1.0,
        disable=None,
    )
    with bar:
        for block in range(blocks):
            part = lengths[block * BLOCK : (block + 1) * BLOCK]
            totals[block] = document_packing.pack_documents(part, sequence_length)[0]
            bar.update(len(part))
    if cache:
        try:
            files.write_bytes(cache, totals.tobytes())
        except OSError as error:
            _log.warning(
                "The packing could not be cached, so each start computes it: %s", error
            )
    return totals
