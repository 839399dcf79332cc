"""Rows of tokens in which sequences share what they begin with.

The choices of a question share its text, and the questions of a task the examples
before them. So sequences are paths in a trie, whose nodes stand in a row depth first:

    sequences   The sky is so blue, The sky is too blue, The sea is
    column      0    1    2   3    4    5
    token       The  sky  is  so   too  sea
    end         6    5    5   4    5    6

The last token of a sequence has no column, since nothing is predicted from it. The
nodes below the one in column `k` stand in columns `k + 1` to `end - 1`. So a token sees
column `k`, at or before its own, if its column is less than `end`: which is
its path, and nothing else. Its position is its depth.
"""

import itertools
from typing import NamedTuple

import numpy as np

# Ours: columns that a row has at least room for. Long enough that few are left over
# at its end, and short enough that attention, which sees them all, is cheap.
COLUMNS = 512
LONG = 2048  # Ours: rows have room for two sequences up to here.
LENGTHS = 4  # Ours: rows of one capacity come in so many lengths, to compile little.
STEP = 128  # Ours: rows beyond `LONG` are as long as a multiple of this.


class Row(NamedTuple):
    """A trie of sequences.

    Attributes:
        tokens: list of int, the nodes.
        ends: list of int, see the top of this file.
        paths: list of `(index, columns)`: which sequence, and where its tokens are, but
            for the last.
    """

    tokens: list
    ends: list
    paths: list


class Batch(NamedTuple):
    """Rows that are computed at once.

    Attributes:
        rows: list of `Row`.
        columns: int, the length that they are filled up to.
    """

    rows: list
    columns: int

    @property
    def indices(self):
        """Numbers of the sequences, each once."""
        return [index for row in self.rows for index, _ in row.paths]


def batches(sequences, batch_size, share=True, indices=None):
    """Packs sequences into rows, and rows into batches, the longest first.

    Args:
        sequences: list of lists of int, none empty.
        batch_size: int, rows of `COLUMNS` tokens in a batch; of longer ones as many as
            have as many tokens, and one at least.
        share: bool; if false each sequence has a row of its own.
        indices: list of int, which of the sequences; all unless given.

    Returns:
        List of `Batch`, the same for the same arguments.
    """
    by_capacity = {}
    for index in range(len(sequences)) if indices is None else indices:
        columns = capacity(len(sequences[index]) - 1)
        by_capacity.setdefault(columns, []).append(index)
    result = []
    for columns, some in sorted(by_capacity.items(), reverse=True):
        rows = pack(sequences, some, columns, share)
        rows.sort(key=lambda row: len(row.tokens), reverse=True)
        step = columns // LENGTHS if columns <= LONG else STEP
        at_once = max(1, batch_size * COLUMNS // columns)
        for first in range(0, len(rows), at_once):
            part = rows[first : first + at_once]
            longest = max(1, len(part[0].tokens))
            result.append(Batch(part, -(-longest // step) * step))
    return result


def capacity(length):
    """Columns of the rows that take sequences of a length: a power of two up to `LONG`.

    There is room for two of them, up to `LONG` columns, so that the choices of a long
    question share its text.
    """
    if length > LONG:
        return -(-length // STEP) * STEP
    columns = max(COLUMNS, length, min(2 * length, LONG))
    return 1 << (columns - 1).bit_length()


def pack(sequences, indices, columns, share=True):
    """Packs sequences into rows.

    Args:
        sequences: list of lists of int.
        indices: list of int, those of them to pack.
        columns: int, tokens of a row at most; no sequence without its last is longer.
        share: see `batches`.

    Returns:
        List of `Row`.
    """
    rows, path, last = [], [], []
    # In order neighbours share the most.
    for index in sorted(indices, key=sequences.__getitem__):
        read = sequences[index][:-1]
        shared = shared_length(last, read)
        filled = len(rows[-1].tokens) if rows else columns
        if not rows or not share or filled + len(read) - shared > columns:
            rows.append(Row([], [], []))
            shared = 0
        path = _add(rows[-1], index, read, path[:shared])
        last = read
    return rows


def shared_length(first, second):
    """int, how many tokens two lists of tokens begin with alike."""
    alike = (x == y for x, y in zip(first, second, strict=False))
    return sum(itertools.takewhile(bool, alike))


def _add(row, index, read, path):
    """Adds a sequence behind the columns of its beginning; returns all its columns."""
    first = len(row.tokens)
    new = read[len(path) :]
    columns = [*path, *range(first, first + len(new))]
    row.tokens.extend(new)
    row.ends.extend([0] * len(new))
    for column in columns:
        row.ends[column] = len(row.tokens)
    row.paths.append((index, np.array(columns, "int64")))
    return columns


def arrays(batch, rows):
    """The tokens of a batch as arrays.

    Args:
        batch: `Batch`.
        rows: int, rows of the arrays, at least as many as the batch has.

    Returns:
        Dict of int32 arrays: `"token_ids"` and `"ends"` `(rows, columns)`, where
        filling sees itself alone, and is not seen; and `"lengths"` `(rows,)`.
    """
    ends = np.tile(np.arange(1, batch.columns + 1, dtype="int32"), (rows, 1))
    token_ids, lengths = np.zeros_like(ends), np.zeros(rows, "int32")
    for i, row in enumerate(batch.rows):
        lengths[i] = len(row.tokens)
        token_ids[i, : lengths[i]] = row.tokens
        ends[i, : lengths[i]] = row.ends
    return {"token_ids": token_ids, "ends": ends, "lengths": lengths}


class Targets:
    """What is predicted in a row: tokens behind columns, each pair once.

    Args:
        row: `Row`.
        sequences: list of lists of int.
        wanted_from: list of int by sequence: from which of its tokens on each is
            predicted, 1 at least.

    Attributes:
        parents: int array, columns that are predicted from.
        tokens: int array, the tokens behind them.
    """

    def __init__(self, row, sequences, wanted_from):
        self._keys = {
            index: columns[wanted_from[index] - 1 :] << 32
            | np.array(sequences[index][wanted_from[index] :], "int64")
            for index, columns in row.paths
        }
        self._pairs = np.unique(np.concatenate(list(self._keys.values())))
        self.parents, self.tokens = self._pairs >> 32, self._pairs & 0xFFFFFFFF

    def __len__(self):
        return len(self._pairs)

    def places(self):
        """Dict by sequence of where its pairs are among them, in its order."""
        return {
            index: np.searchsorted(self._pairs, keys)
            for index, keys in self._keys.items()
        }
