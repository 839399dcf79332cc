"""Packs token sequences with common prefixes into tries.

The answers to a question share the question, and the questions of a few-shot task share
the examples. Each distinct prefix is computed only once: sequences are paths in a trie,
and the nodes of a trie are laid out in depth-first order as one packed sequence:

    sequences   The sky is so blue, The sky is too blue, The sea is
    node        0    1    2   3    4    5
    token       The  sky  is  so   too  sea
    end         6    5    5   4    5    6

The last token of a sequence has no node, since nothing is predicted from it. Node `k`
has the descendants `k + 1` to `end - 1`. A node attends to node `k` if its own index is
at least `k` and less than the `end` of node `k`. These are the nodes on its path, and
no others. Its position, for RoPE, is its depth.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

# Heuristic: the least capacity of a packed sequence. Large enough to waste little of
# it, and small enough for full attention over it to be cheap.
PACKED_LENGTH = 512
# Heuristic: packed sequences up to this capacity can hold two sequences of any length.
LONG = 2048
# Heuristic: batches of one capacity are padded to this many different lengths, so that
# few programs are compiled.
LENGTHS_PER_CAPACITY = 4
# Heuristic: beyond `LONG`, capacities and padded lengths are multiples of this.
LONG_STEP = 128


class PrefixTrie(NamedTuple):
    """A trie of sequences, laid out as one packed sequence.

    Attributes:
        tokens: token id of each node.
        ends: end of each node's subtree, see the docstring of this module.
        paths: pairs of the index of a sequence and the nodes of its tokens, an int64
            array. The last token has no node.
    """

    tokens: list[int]
    ends: list[int]
    paths: list[tuple[int, np.ndarray]]


class TrieBatch(NamedTuple):
    """A batch of tries.

    Attributes:
        tries: the tries.
        length: the length that they are padded to.
    """

    tries: list[PrefixTrie]
    length: int

    @property
    def sequence_indices(self) -> list[int]:
        """Indices of the sequences in this batch, each once."""
        return [index for trie in self.tries for index, _ in trie.paths]


def make_batches(
    sequences: Sequence[Sequence[int]],
    batch_size: int,
    share_prefixes: bool = True,
    indices: Sequence[int] | None = None,
) -> list[TrieBatch]:
    """Packs sequences into tries, and tries into batches, the longest first.

    Args:
        sequences: token ids of each sequence. None may be empty.
        batch_size: number of tries of `PACKED_LENGTH` tokens in a batch. Batches of
            longer tries have as many tokens, but at least one trie.
        share_prefixes: if `False`, each sequence has its own trie.
        indices: indices of the sequences to pack; all by default.

    Returns:
        The batches. They depend on the arguments only.

    Example:
        >>> [batch] = make_batches([[1, 2, 3], [1, 2, 4, 5]], batch_size=8)
        >>> batch.tries[0].tokens, batch.length
        ([1, 2, 4], 128)
    """
    by_capacity = {}
    for index in range(len(sequences)) if indices is None else indices:
        capacity = packed_capacity(len(sequences[index]) - 1)
        by_capacity.setdefault(capacity, []).append(index)
    result = []
    for capacity, members in sorted(by_capacity.items(), reverse=True):
        tries = pack_sequences(sequences, members, capacity, share_prefixes)
        tries.sort(key=lambda trie: len(trie.tokens), reverse=True)
        step = capacity // LENGTHS_PER_CAPACITY if capacity <= LONG else LONG_STEP
        tries_per_batch = max(1, batch_size * PACKED_LENGTH // capacity)
        for first in range(0, len(tries), tries_per_batch):
            part = tries[first : first + tries_per_batch]
            longest = max(1, len(part[0].tokens))
            result.append(TrieBatch(part, -(-longest // step) * step))
    return result


def packed_capacity(length: int) -> int:
    """Returns the capacity of the tries that hold sequences of a length.

    Up to `LONG` it is a power of two, with room for two sequences, so that the answers
    to a long question can share it.

    Example:
        >>> packed_capacity(100), packed_capacity(300), packed_capacity(2049)
        (512, 1024, 2176)
    """
    if length > LONG:
        return -(-length // LONG_STEP) * LONG_STEP
    capacity = max(PACKED_LENGTH, length, min(2 * length, LONG))
    return 1 << (capacity - 1).bit_length()


def pack_sequences(
    sequences: Sequence[Sequence[int]],
    indices: Sequence[int],
    capacity: int,
    share_prefixes: bool = True,
) -> list[PrefixTrie]:
    """Packs sequences into tries.

    Args:
        sequences: token ids of each sequence.
        indices: indices of the sequences to pack.
        capacity: maximum number of nodes of a trie. Each sequence must fit into it
            without its last token.
        share_prefixes: if `False`, each sequence has its own trie.

    Returns:
        The tries.

    Example:
        >>> [trie] = pack_sequences([[1, 2, 3, 4], [1, 5, 6]], [0, 1], capacity=8)
        >>> trie.tokens, trie.ends
        ([1, 2, 3, 5], [4, 3, 3, 4])
    """
    tries, path, last = [], [], []
    # After sorting, neighbors have the longest common prefixes.
    for index in sorted(indices, key=sequences.__getitem__):
        tokens = sequences[index][:-1]
        shared = common_prefix_length(last, tokens)
        used = len(tries[-1].tokens) if tries else capacity
        if not tries or not share_prefixes or used + len(tokens) - shared > capacity:
            tries.append(PrefixTrie([], [], []))
            shared = 0
        path = _insert(tries[-1], index, tokens, path[:shared])
        last = tokens
    return tries


def common_prefix_length(first: Sequence[int], second: Sequence[int]) -> int:
    """Returns the length of the common prefix of two sequences of token ids.

    Example:
        >>> common_prefix_length([1, 2, 3], [1, 2, 4])
        2
    """
    equal = (x == y for x, y in zip(first, second, strict=False))
    return sum(itertools.takewhile(bool, equal))


def _insert(trie, index, tokens, path):
    """Inserts a sequence after the nodes of its prefix; returns all its nodes."""
    first = len(trie.tokens)
    new = tokens[len(path) :]
    nodes = [*path, *range(first, first + len(new))]
    trie.tokens.extend(new)
    trie.ends.extend([0] * len(new))
    for node in nodes:
        trie.ends[node] = len(trie.tokens)
    trie.paths.append((index, np.array(nodes, "int64")))
    return nodes


def batch_arrays(batch: TrieBatch, batch_size: int) -> dict[str, np.ndarray]:
    """Pads the tries of a batch into arrays.

    Args:
        batch: the batch.
        batch_size: first axis of the arrays, at least the number of tries.

    Returns:
        int32 arrays: `"token_ids"` and `"ends"` of shape `(batch_size, length)`, in
        which padding attends only to itself and is not attended to, and `"lengths"` of
        shape `(batch_size,)`.
    """
    ends = np.tile(np.arange(1, batch.length + 1, dtype="int32"), (batch_size, 1))
    token_ids, lengths = np.zeros_like(ends), np.zeros(batch_size, "int32")
    for i, trie in enumerate(batch.tries):
        lengths[i] = len(trie.tokens)
        token_ids[i, : lengths[i]] = trie.tokens
        ends[i, : lengths[i]] = trie.ends
    return {"token_ids": token_ids, "ends": ends, "lengths": lengths}


class TrieTargets:
    """The tokens to score in a trie: distinct pairs of a node and a next token.

    Args:
        trie: the trie.
        sequences: token ids of each sequence.
        score_from: for each sequence, the index of the first token to score, at least
            1.

    Attributes:
        nodes: the node that predicts each target, an int64 array `(targets,)`.
        tokens: token id of each target, an int64 array `(targets,)`.

    Example:
        >>> sequences = [[1, 2, 3], [1, 2, 4]]
        >>> [trie] = pack_sequences(sequences, [0, 1], capacity=8)
        >>> targets = TrieTargets(trie, sequences, [2, 2])
        >>> targets.nodes.tolist(), targets.tokens.tolist()
        ([1, 1], [3, 4])
    """

    def __init__(
        self,
        trie: PrefixTrie,
        sequences: Sequence[Sequence[int]],
        score_from: Sequence[int],
    ):
        self._keys = {
            index: nodes[score_from[index] - 1 :] << 32
            | np.array(sequences[index][score_from[index] :], "int64")
            for index, nodes in trie.paths
        }
        self._pairs = np.unique(np.concatenate(list(self._keys.values())))
        self.nodes, self.tokens = self._pairs >> 32, self._pairs & 0xFFFFFFFF

    def __len__(self) -> int:
        return len(self._pairs)

    def indices_by_sequence(self) -> dict[int, np.ndarray]:
        """Returns the indices of each sequence's targets, in the sequence's order."""
        return {
            index: np.searchsorted(self._pairs, keys)
            for index, keys in self._keys.items()
        }
