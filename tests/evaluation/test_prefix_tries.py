"""Sequences share prefixes in tries, and each attends only to its own tokens."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keras_openllama.evaluation.prefix_tries import (
    PACKED_LENGTH,
    TrieTargets,
    batch_arrays,
    common_prefix_length,
    make_batches,
    pack_sequences,
    packed_capacity,
)

pytestmark = pytest.mark.backend_free

SKY = [[10, 11, 12, 13, 7], [10, 11, 12, 14, 7], [10, 15, 7]]
few_tokens = st.lists(st.integers(0, 2), min_size=1, max_size=9)


def attended_nodes(trie, node):
    """Nodes that a node attends to, according to the attention mask."""
    return [k for k in range(node + 1) if node < trie.ends[k]]


def test_pack_sequences_gives_the_example_of_the_module_docstring():
    (trie,) = pack_sequences(SKY, range(3), capacity=8)
    assert trie.tokens == [10, 11, 12, 13, 14, 15]
    assert trie.ends == [6, 5, 5, 4, 5, 6]


@settings(deadline=None)
@given(st.lists(few_tokens, min_size=1, max_size=12), st.integers(9, 20), st.booleans())
def test_pack_sequences_makes_paths_that_attend_only_to_themselves(
    sequences, capacity, share
):
    tries = pack_sequences(sequences, range(len(sequences)), capacity, share)
    found = []
    for trie in tries:
        assert len(trie.tokens) <= capacity
        for index, path in trie.paths:
            found.append(index)
            assert [trie.tokens[k] for k in path] == sequences[index][:-1]
            for depth, node in enumerate(path):
                assert attended_nodes(trie, node) == path[: depth + 1].tolist()
    assert sorted(found) == list(range(len(sequences)))


def test_pack_sequences_stores_a_common_prefix_once():
    context = list(range(100))
    sequences = [[*context, *range(1000 + 10 * i, 1010 + 10 * i)] for i in range(4)]
    (trie,) = pack_sequences(sequences, range(4), capacity=512)
    assert len(trie.tokens) == 100 + 4 * 9


def test_pack_sequences_adds_no_nodes_for_a_prefix_of_another_sequence():
    (trie,) = pack_sequences(
        [[1, 2, 3, 4], [1, 2, 3], [1, 2, 3, 5]], range(3), capacity=8
    )
    assert trie.tokens == [1, 2, 3]


def test_pack_sequences_without_sharing_makes_a_trie_per_sequence():
    assert len(pack_sequences(SKY, range(3), capacity=8, share_prefixes=False)) == 3


def test_make_batches_is_deterministic_and_puts_the_longest_first():
    generator = np.random.default_rng(0)
    sequences = [
        generator.integers(3, 99, length).tolist()
        for length in generator.integers(1, 1500, 60)
    ]
    first, again = (make_batches(sequences, batch_size=4) for _ in range(2))
    assert [batch.sequence_indices for batch in first] == [
        batch.sequence_indices for batch in again
    ]
    found = [index for batch in first for index in batch.sequence_indices]
    assert sorted(found) == list(range(60))
    lengths = [batch.length for batch in first]
    assert lengths == sorted(lengths, reverse=True)
    for batch in first:
        assert len(batch.tries) * batch.length <= max(4 * PACKED_LENGTH, batch.length)


def test_packed_capacity_has_room_for_two_sequences_up_to_2048_tokens():
    lengths = [0, 256, 257, 700, 1024, 2048, 2049]
    capacities = [512, 512, 1024, 2048, 2048, 2048, 2176]
    assert list(map(packed_capacity, lengths)) == capacities


def test_make_batches_packs_only_the_given_indices():
    (batch,) = make_batches(SKY, batch_size=2, indices=[2, 0])
    assert sorted(batch.sequence_indices) == [0, 2]


def test_batch_arrays_lets_padding_attend_only_to_itself():
    (batch,) = make_batches(SKY, batch_size=2)
    found = batch_arrays(batch, batch_size=2)
    assert found["lengths"].tolist() == [6, 0]
    assert found["token_ids"][0, :7].tolist() == [10, 11, 12, 13, 14, 15, 0]
    assert found["ends"][0, 6:].tolist() == list(range(7, batch.length + 1))
    assert found["ends"][1].tolist() == list(range(1, batch.length + 1))


def test_trie_targets_are_distinct_pairs_of_node_and_token():
    sequences = [*SKY, [10, 11, 12], SKY[0]]
    (trie,) = pack_sequences(sequences, range(5), capacity=8)
    targets = TrieTargets(trie, sequences, [3, 3, 1, 2, 4])
    pairs = list(zip(targets.nodes.tolist(), targets.tokens.tolist(), strict=True))
    assert pairs == [(0, 15), (1, 12), (2, 13), (2, 14), (3, 7), (4, 7), (5, 7)]
    places = {
        index: place.tolist() for index, place in targets.indices_by_sequence().items()
    }
    assert places == {0: [2, 4], 1: [3, 5], 2: [0, 6], 3: [1], 4: [4]}


def test_common_prefix_length():
    assert common_prefix_length([1, 2, 3], [1, 2, 4]) == 2
    assert common_prefix_length([1], [1, 2]) == 1
    assert common_prefix_length([], [1]) == 0
