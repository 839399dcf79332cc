"""Sequences share their beginnings in rows, and each still sees itself alone."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keras_openllama.evaluation.prefix_tries import (
    COLUMNS,
    Targets,
    arrays,
    batches,
    capacity,
    pack,
    shared_length,
)

pytestmark = pytest.mark.backend_free

SKY = [[10, 11, 12, 13, 7], [10, 11, 12, 14, 7], [10, 15, 7]]
few_tokens = st.lists(st.integers(0, 2), min_size=1, max_size=9)


def seen_by(row, column):
    """Columns that the token in a column sees, as the model's mask has it."""
    return [k for k in range(column + 1) if column < row.ends[k]]


def test_the_example_at_the_top_of_the_file_is_true():
    (row,) = pack(SKY, range(3), columns=8)
    assert row.tokens == [10, 11, 12, 13, 14, 15]
    assert row.ends == [6, 5, 5, 4, 5, 6]


@settings(deadline=None)
@given(st.lists(few_tokens, min_size=1, max_size=12), st.integers(9, 20), st.booleans())
def test_each_sequence_is_a_path_that_sees_itself_and_nothing_else(
    sequences, columns, share
):
    rows = pack(sequences, range(len(sequences)), columns, share)
    found = []
    for row in rows:
        assert len(row.tokens) <= columns
        for index, path in row.paths:
            found.append(index)
            assert [row.tokens[k] for k in path] == sequences[index][:-1]
            for depth, column in enumerate(path):
                assert seen_by(row, column) == path[: depth + 1].tolist()
    assert sorted(found) == list(range(len(sequences)))


def test_what_is_common_is_computed_once():
    context = list(range(100))
    sequences = [[*context, *range(1000 + 10 * i, 1010 + 10 * i)] for i in range(4)]
    (row,) = pack(sequences, range(4), columns=512)
    assert len(row.tokens) == 100 + 4 * 9


def test_a_sequence_that_begins_another_adds_nothing():
    (row,) = pack([[1, 2, 3, 4], [1, 2, 3], [1, 2, 3, 5]], range(3), columns=8)
    assert row.tokens == [1, 2, 3]


def test_without_sharing_each_sequence_has_a_row():
    assert len(pack(SKY, range(3), columns=8, share=False)) == 3


def test_batches_are_the_same_for_the_same_sequences_and_the_longest_come_first():
    generator = np.random.default_rng(0)
    sequences = [
        generator.integers(3, 99, length).tolist()
        for length in generator.integers(1, 1500, 60)
    ]
    first, again = (batches(sequences, batch_size=4) for _ in range(2))
    assert [batch.indices for batch in first] == [batch.indices for batch in again]
    found = [index for batch in first for index in batch.indices]
    assert sorted(found) == list(range(60))
    columns = [batch.columns for batch in first]
    assert columns == sorted(columns, reverse=True)
    for batch in first:
        assert len(batch.rows) * batch.columns <= max(4 * COLUMNS, batch.columns)


def test_a_row_has_room_for_two_sequences_up_to_2048_columns():
    lengths = [0, 256, 257, 700, 1024, 2048, 2049]
    rooms = [512, 512, 1024, 2048, 2048, 2048, 2176]
    assert list(map(capacity, lengths)) == rooms


def test_only_asked_for_sequences_are_packed():
    (batch,) = batches(SKY, batch_size=2, indices=[2, 0])
    assert sorted(batch.indices) == [0, 2]


def test_filling_sees_itself_and_is_not_seen():
    (batch,) = batches(SKY, batch_size=2)
    found = arrays(batch, rows=2)
    assert found["lengths"].tolist() == [6, 0]
    assert found["token_ids"][0, :7].tolist() == [10, 11, 12, 13, 14, 15, 0]
    assert found["ends"][0, 6:].tolist() == list(range(7, batch.columns + 1))
    assert found["ends"][1].tolist() == list(range(1, batch.columns + 1))


def test_targets_are_tokens_behind_columns_each_pair_once():
    sequences = [*SKY, [10, 11, 12], SKY[0]]
    (row,) = pack(sequences, range(5), columns=8)
    targets = Targets(row, sequences, [3, 3, 1, 2, 4])
    pairs = list(zip(targets.parents.tolist(), targets.tokens.tolist(), strict=True))
    assert pairs == [(0, 15), (1, 12), (2, 13), (2, 14), (3, 7), (4, 7), (5, 7)]
    places = {index: place.tolist() for index, place in targets.places().items()}
    assert places == {0: [2, 4], 1: [3, 5], 2: [0, 6], 3: [1], 4: [4]}


def test_shared_length_is_that_of_the_common_beginning():
    assert shared_length([1, 2, 3], [1, 2, 4]) == 2
    assert shared_length([1], [1, 2]) == 1
    assert shared_length([], [1]) == 0
