"""Best-fit packing of documents into rows."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keras_openllama.data.document_packing import best_fit_decreasing, pack, pieces

pytestmark = pytest.mark.backend_free

LENGTHS = st.lists(st.integers(2, 100), min_size=1, max_size=60).map(np.array)


@settings(max_examples=200, deadline=None)
@given(LENGTHS, st.integers(1, 40))
def test_every_token_but_a_documents_first_is_predicted_once(lengths, length):
    documents, starts, sizes = pieces(lengths, length)
    for document, total in enumerate(lengths):
        predicted = []
        for start, size in zip(
            starts[documents == document], sizes[documents == document], strict=True
        ):
            predicted += range(start + 1, start + size)
        assert predicted == list(range(1, total))


@settings(max_examples=200, deadline=None)
@given(LENGTHS, st.integers(1, 40))
def test_rows_are_not_overfull_and_no_document_is_cut_that_fits(lengths, length):
    count, rows, documents, starts, sizes = pack(lengths, length)
    assert set(rows.tolist()) == set(range(count))
    assert (np.bincount(rows, sizes) <= length + 1).all()
    for document, total in enumerate(lengths):
        if total <= length + 1:
            [place] = np.flatnonzero(documents == document)
            assert (starts[place], sizes[place]) == (0, total)


def test_each_goes_where_it_leaves_the_least_room():
    # 7 and 5 open bins; 4 fits the room of 5 left beside the 5 as well as no other; 3
    # fills the bin of 7 to the brim.
    sizes = np.array([3, 5, 7, 4])
    bins = best_fit_decreasing(sizes, 10)
    assert bins[0] == bins[2]
    assert bins[1] == bins[3]
    assert bins.max() == 1


def test_rows_are_nearly_full():
    lengths = np.random.default_rng(0).lognormal(6.2, 1.1, 1024).astype(int) + 3
    count, *_ = pack(lengths, 2048)
    assert (lengths - 1).sum() / (count * 2048) > 0.99


def test_nothing_makes_no_row():
    assert pack(np.array([], "uint32"), 8)[0] == 0
    assert pack(np.array([1]), 8)[0] == 0
