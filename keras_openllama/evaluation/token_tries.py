"""Rows of tokens in which sequences share what they begin with.

The choices of a question share its text, and the questions of a task the examples
before them. So sequences are paths in a trie, whose nodes stand in a row depth first:

    sequences   The sky is blue     The sky is red     The sea
    column      0    1    2   3     4    5
    token       The  sky  is  blue  red  sea
    parent      -    0    1   2     2    0
    end         6    5    5   4     5    6

The nodes below the one in column `k` stand in columns `k + 1` to `end - 1`. So a token
sees column `k`, at or before its own, if its column is less than `end`: which is its
path, and nothing else. Its position is its depth.
"""

import itertools
from typing import NamedTuple

import numpy as np

# Ours: columns that a row has at least room for. Long enough that few are left over
# at its end, and short enough that attention, which sees them all, is cheap.
COLUMNS = 512
# Ours: rows are longer than their longest sequence only up to here.
LONG = 2048
# Ours: rows of a batch are as long as a multiple of this.
STEP = 128


class Row(NamedTuple):
    """A trie of sequences.

    Attributes:
        tokens: list of int, the nodes.
        parents: list of int, column of the node before; -1 for the first of a path.
        ends: list of int, see the top of this file.
        paths: list of `(index, columns)`: which sequence, and where its tokens are.
    """

    tokens: list
    parents: list
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
        by_capacity.setdefault(capacity(len(sequences[index])), []).append(index)
    result = []
    for columns, indices in sorted(by_capacity.items(), reverse=True):
        rows = pack(sequences, indices, columns, share)
        at_once = max(1, batch_size * COLUMNS // columns)
        for first in range(0, len(rows), at_once):
            part = rows[first : first + at_once]
            longest = max(len(row.tokens) for row in part)
            result.append(Batch(part, -(-longest // STEP) * STEP))
    return result


def capacity(length):
    """Columns of the rows that take a sequence of this length: a power of two.

    There is room for two of them, up to `LONG` columns, so that the choices of a long
    question share its text.
    """
    columns = max(COLUMNS, length, min(2 * length, LONG))
    return 1 << (columns - 1).bit_length()


def pack(sequences, indices, columns, share=True):
    """Packs sequences into rows.

    Args:
        sequences: list of lists of int.
        indices: list of int, those of them to pack.
        columns: int, tokens of a row at most; no sequence is longer.
        share: see `batches`.

    Returns:
        List of `Row`.
    """
    rows, path, last = [], [], []
    # In order neighbours share the most.
    for index in sorted(indices, key=sequences.__getitem__):
        sequence = sequences[index]
        shared = shared_length(last, sequence)
        filled = len(rows[-1].tokens) if rows else columns
        if not share or filled + len(sequence) - shared > columns:
            rows.append(Row([], [], [], []))
            path, shared = [], 0
        path = _add(rows[-1], index, sequence, path[:shared])
        last = sequence
    return rows


def shared_length(first, second):
    """int, how many tokens two lists of tokens begin with alike."""
    alike = (x == y for x, y in zip(first, second, strict=False))
    return sum(itertools.takewhile(bool, alike))


def _add(row, index, sequence, path):
    """Adds a sequence behind the columns of its beginning; returns all its columns."""
    first = len(row.tokens)
    new = sequence[len(path) :]
    columns = [*path, *range(first, first + len(new))]
    row.tokens.extend(new)
    row.parents.extend([-1, *columns][len(path) : len(columns)])
    row.ends.extend([0] * len(new))
    for column in columns:
        row.ends[column] = len(row.tokens)
    row.paths.append((index, np.array(columns, "int32")))
    return columns


def arrays(batch, rows, wanted):
    """A batch as arrays.

    Args:
        batch: `Batch`.
        rows: int, rows of the arrays, at least as many as the batch has.
        wanted: list of int arrays by row of the batch: columns of tokens to score.

    Returns:
        Dict of int32 arrays `(rows, columns)`: `"token_ids"` and `"ends"`, where
        filling sees itself alone, and is not seen; and from the left `"targets"`, the wanted
        tokens, and `"parents"`, the columns before them.
    """
    shape = rows, batch.columns
    names = "token_ids", "ends", "targets", "parents"
    result = {name: np.zeros(shape, "int32") for name in names}
    result["ends"] += np.arange(1, batch.columns + 1, dtype="int32")
    for i, (row, columns) in enumerate(zip(batch.rows, wanted, strict=True)):
        tokens, length = np.array(row.tokens), len(row.tokens)
        result["token_ids"][i, :length] = tokens
        result["ends"][i, :length] = row.ends
        result["targets"][i, : len(columns)] = tokens[columns]
        result["parents"][i, : len(columns)] = np.array(row.parents)[columns]
    return result


def wanted_columns(row, wanted_from):
    """Columns of a row's tokens that any of its sequences wants, in order.

    Args:
        row: `Row`.
        wanted_from: list of int by sequence: from which of its tokens on each is
            wanted.
    """
    parts = [columns[wanted_from[index] :] for index, columns in row.paths]
    return np.unique(np.concatenate(parts))
