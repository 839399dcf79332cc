"""The sequences that the documents of a source make (rows of a batch), by number.

A row of `length` predictions holds `length + 1` tokens: what is read, and what is to be
predicted, one token ahead. Rows are numbered through all epochs.
"""

import collections
import logging
import threading

import numpy as np
from tqdm import tqdm

from keras_openllama.data import document_packing, shuffling
from keras_openllama.data.prepared_data import block_totals
from keras_openllama.data.shuffling import BLOCK
from keras_openllama.utils import files

_CHUNK = 1 << 22  # Documents that are counted at once.
# A row may begin in one and end in the next, while other threads end the one before.
_GROUPS_KEPT = 3

_log = logging.getLogger(__name__)


class _Rows:
    """What both ways of packing share.

    Args:
        documents: `prepared_data.Documents`, or what has `lengths` as they do.
        length: int, predictions a row makes.
        key: int, decides about the order.
        totals: int64 array `(blocks,)`, what each block holds.

    Attributes:
        epoch_rows: float, rows an epoch has.
    """

    def __init__(self, documents, length, key, totals):
        self._documents, self._length = documents, length
        self._order = shuffling.Order(totals, key)
        self._begin()

    def _begin(self):
        self._groups = collections.OrderedDict()
        self._lock = threading.Lock()  # Several threads read batches.

    def __getstate__(self):
        state = {**self.__dict__}
        del state["_groups"], state["_lock"]
        return state

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._begin()

    def spans(self, row):
        """What a row consists of.

        Args:
            row: int.

        Returns:
            List of `(document, first token, tokens)`.
        """
        with self._lock:
            return self._spans(row)

    def _group(self, epoch, group):
        """What is known of a group; the last ones are kept."""
        if (epoch, group) not in self._groups:
            while len(self._groups) >= _GROUPS_KEPT:
                self._groups.popitem(last=False)
            blocks = self._order.blocks(epoch, group)
            key = self._order.key_of(epoch, group)
            self._groups[epoch, group] = self._open(blocks, key)
        return self._groups[epoch, group]

    def _numbers(self, block):
        """Numbers of the documents of a block."""
        count = len(self._documents.lengths)
        return np.arange(block * BLOCK, min((block + 1) * BLOCK, count))


class Concatenated(_Rows):
    """All documents in a row, cut every `length` tokens, as LLaMA did.

    Every token of an epoch is predicted once; the last row of an epoch goes on with the
    next. The rows that begin in a group are shuffled, so that those of a long document
    are not all in one batch.
    """

    def __init__(self, documents, length, key):
        totals = block_totals(documents.lengths)
        super().__init__(documents, length, key, totals)
        self.epoch_rows = self._order.total / length

    def row_tokens(self):
        """Tokens a row predicts, on average."""
        return float(self._length)

    def _open(self, blocks, key):
        """The documents of a group in shuffled order, where each ends; rows' order."""
        numbers = np.concatenate([self._numbers(block) for block in blocks.tolist()])
        numbers = numbers[shuffling.permutation(len(numbers), key)]
        ends = np.cumsum(self._documents.lengths[numbers], dtype="int64")
        rows = int(ends[-1]) // self._length
        order = shuffling.permutation(rows, shuffling.key(key, "rows"))
        return numbers, ends, order

    def _shuffled(self, row):
        """The row that has the place of `row` in the shuffled order."""
        epoch, group, within = self._order.locate(row * self._length)
        order = self._group(epoch, group)[2]
        # The first row of a group begins less than a row behind the group's beginning.
        # So there are as many as the order has, or one more, which stays the last.
        index = within // self._length
        return row + int(order[index]) - index if index < len(order) else row

    def _spans(self, row):
        position, missing = self._shuffled(row) * self._length, self._length + 1
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


class BestFit(_Rows):
    """Documents share rows, and none is cut that fits into one; see
    `document_packing`.

    Documents of one block share rows, the same ones in every epoch; the rows are
    shuffled. What is left of a row is padding.
    """

    def __init__(self, documents, length, key, cache=None):
        totals = _rows_per_block(documents.lengths, length, cache)
        super().__init__(documents, length, key, totals.astype("int64"))
        self.epoch_rows = float(self._order.total)

    def row_tokens(self):
        """As `Concatenated.row_tokens`."""
        lengths, tokens = self._documents.lengths, 0
        for start in range(0, len(lengths), _CHUNK):
            predictions = lengths[start : start + _CHUNK].astype("int64") - 1
            # Each piece but a row's last predicts the first token of the next.
            pieces = -(-predictions // self._length)
            tokens += int(predictions.sum() + pieces.sum())
        return tokens / self.epoch_rows - 1

    def _open(self, blocks, key):
        """Pieces of the group's documents by row, and the shuffled order of rows."""
        pieces, starts, count = [], [np.zeros(1, "int64")], 0
        for block in blocks.tolist():
            numbers = self._numbers(block)
            rows, of_piece, documents, firsts, sizes = document_packing.pack(
                self._documents.lengths[numbers], self._length
            )
            ends = np.searchsorted(of_piece, np.arange(rows), side="right")
            pieces.append(np.stack([numbers[documents], firsts, sizes], axis=1))
            starts.append(ends + count)
            count += len(of_piece)
        starts = np.concatenate(starts)
        order = shuffling.permutation(len(starts) - 1, key)
        return np.concatenate(pieces), starts, order

    def _spans(self, row):
        epoch, group, within = self._order.locate(row)
        pieces, starts, order = self._group(epoch, group)
        chosen = int(order[within])
        row = pieces[starts[chosen] : starts[chosen + 1]]
        return [tuple(span) for span in row.tolist()]


def _rows_per_block(lengths, length, cache):
    """Reads from `cache` (path or `None`), or computes and writes it there."""
    blocks = -(-len(lengths) // BLOCK)
    if cache and files.exists(cache):
        totals = np.frombuffer(files.read_bytes(cache), "<u4")
        if len(totals) == blocks:
            return totals
    totals = np.empty(blocks, "<u4")
    bar = tqdm(
        desc=f"Packing into rows of {length}, once for all runs",
        total=len(lengths),
        unit="document",
        unit_scale=True,
        delay=1.0,
        disable=None,
    )
    with bar:
        for block in range(blocks):
            part = lengths[block * BLOCK : (block + 1) * BLOCK]
            totals[block] = document_packing.pack(part, length)[0]
            bar.update(len(part))
    if cache:
        try:
            files.write_bytes(cache, totals.tobytes())
        except OSError as error:
            _log.warning("The packing is computed anew at each start: %s", error)
    return totals
