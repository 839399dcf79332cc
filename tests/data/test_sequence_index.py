"""Rows by number: each document once an epoch, at any place, of any index."""

import collections
import types

import numpy as np
import pytest

from keras_openllama.data.sequence_index import BestFit, Concatenated
from keras_openllama.data.shuffling import BLOCK, GROUP

pytestmark = pytest.mark.backend_free

PACKINGS = [Concatenated, BestFit]


def index(count, seed=0, low=3, high=60):
    """What the rows need to know of documents: how many tokens each has."""
    lengths = np.random.default_rng(seed).integers(low, high, count).astype("<u4")
    return types.SimpleNamespace(lengths=lengths)


def predicted(spans):
    """Which tokens a row predicts: all but the first of it."""
    tokens = [
        (document, first + i) for document, first, size in spans for i in range(size)
    ]
    return tokens[1:]


def test_concatenated_rows_predict_every_token_of_an_epoch_once():
    documents = index(2 * BLOCK + 100)
    total = int(documents.lengths.sum())
    rows = Concatenated(documents, 50, key=1)
    tokens = [t for row in range(total // 50 + 1) for t in predicted(rows.spans(row))]
    # The last row goes on with the next epoch. The very first token of all is read and
    # not predicted: the epoch before gives it.
    everything = {
        (d, i) for d, size in enumerate(documents.lengths) for i in range(size)
    }
    assert len(tokens[: total - 1]) == len(set(tokens[: total - 1]))
    [(_, place)] = everything - set(tokens[: total - 1])
    assert place == 0


def test_best_fit_rows_hold_every_document_once_an_epoch():
    documents = index(2 * BLOCK + 100, high=120)
    rows = BestFit(documents, 50, key=1)
    epoch = int(rows.epoch_rows)
    for start in (0, epoch):
        spans = [s for row in range(start, start + epoch) for s in rows.spans(row)]
        held = sorted(
            (document, first + i)
            for document, first, size in spans
            for i in range(1, size)
        )
        assert held == [
            (d, i) for d, size in enumerate(documents.lengths) for i in range(1, size)
        ]


@pytest.mark.parametrize("packing", PACKINGS)
def test_epochs_have_different_orders_and_seeds_too(packing):
    documents = index(BLOCK)
    rows, other = packing(documents, 50, key=1), packing(documents, 50, key=2)
    epoch = int(rows.epoch_rows)
    first = [rows.spans(row) for row in range(20)]
    assert first != [rows.spans(epoch + row) for row in range(20)]
    assert first != [other.spans(row) for row in range(20)]
    assert first == [packing(documents, 50, key=1).spans(row) for row in range(20)]


@pytest.mark.parametrize("packing", PACKINGS)
def test_a_row_does_not_depend_on_what_was_read_before(packing):
    # More than two groups, so that they are opened, dropped and opened again.
    documents = index((2 * GROUP + 3) * BLOCK, high=12)
    rows = packing(documents, 300, key=5)
    last = 3 * int(rows.epoch_rows)
    chosen = np.random.default_rng(1).integers(0, last, 12).tolist()
    found = {row: rows.spans(row) for row in chosen}
    for row in sorted(chosen):
        assert packing(documents, 300, key=5).spans(row) == found[row]
        assert rows.spans(row) == found[row]


def test_each_concatenated_row_goes_on_where_another_ended():
    rows = Concatenated(index(300), 17, key=3)
    epoch = int(rows.epoch_rows)
    spans = [rows.spans(row) for row in range(2 * epoch)]  # Across the epochs' border.
    assert {sum(size for *_, size in row) for row in spans} == {18}
    starts = [row[0][:2] for row in spans]
    ends = [(document, first + size - 1) for *_, (document, first, size) in spans]
    # All but the first of the first epoch, and the last of the second.
    assert sum((collections.Counter(starts) - collections.Counter(ends)).values()) == 1
    assert starts[1:] != ends[:-1]


def test_rows_of_a_long_document_are_far_from_each_other():
    documents = types.SimpleNamespace(lengths=np.full(100, 1000, "<u4"))
    rows = Concatenated(documents, 10, key=1)
    batch = {rows.spans(row)[0][0] for row in range(5000, 5016)}
    assert len(batch) >= 10


def test_a_document_can_be_longer_than_rows_and_a_source_shorter():
    documents = types.SimpleNamespace(lengths=np.array([1000], "<u4"))
    rows = Concatenated(documents, 100, key=0)
    assert sorted(rows.spans(row) for row in range(10)) == [
        *([(0, start, 101)] for start in range(0, 900, 100)),
        [(0, 900, 100), (0, 0, 1)],
    ]
    tiny = types.SimpleNamespace(lengths=np.array([3], "<u4"))
    assert Concatenated(tiny, 8, key=0).spans(0) == [(0, 0, 3)] * 3
    assert BestFit(tiny, 8, key=0).spans(5) == [(0, 0, 3)]
    long = BestFit(documents, 100, key=0)
    assert sorted(s for row in range(10) for s in long.spans(row)) == [
        (0, start, min(101, 1000 - start)) for start in range(0, 999, 100)
    ]


def test_documents_are_shuffled_across_the_source():
    # Of neighbours in a row few are neighbours in the source, and they come from all of
    # it: 64 blocks of a thousand.
    rows = Concatenated(index(1000 * BLOCK, high=5), 2000, key=3)
    documents = np.array([document for document, *_ in rows.spans(0)])
    assert (np.abs(np.diff(documents)) == 1).mean() < 0.01
    assert len(set((documents // BLOCK).tolist())) > 0.9 * GROUP
    assert documents.std() > 0.2 * 1000 * BLOCK


def test_the_packing_is_kept_beside_the_data(tmp_path):
    documents = index(3 * BLOCK)
    cache = str(tmp_path / "train.rows-50")
    rows = BestFit(documents, 50, key=1, cache=cache)
    kept = np.fromfile(cache, "<u4")
    assert kept.sum() == rows.epoch_rows
    np.testing.assert_array_equal(kept, np.fromfile(cache, "<u4"))
    # It is believed, where it is for as many documents; else computed anew.
    (kept + 1).astype("<u4").tofile(cache)
    assert BestFit(documents, 50, key=1, cache=cache).epoch_rows == kept.sum() + 3
    kept[:2].tofile(cache)
    assert BestFit(documents, 50, key=1, cache=cache).epoch_rows == kept.sum()


def test_rows_are_the_same_for_ever():
    # Runs that were begun with another version go on with this one.
    lengths = (3 + np.arange(5 * BLOCK) * 7 % 57).astype("<u4")
    documents = types.SimpleNamespace(lengths=lengths)
    assert Concatenated(documents, 50, key=1).spans(1000) == [
        (484, 14, 14),
        (1439, 0, 37),
    ]
    assert BestFit(documents, 50, key=1).spans(1000) == [(144, 0, 42), (408, 0, 9)]
