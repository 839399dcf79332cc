"""Best-fit packing of documents into sequences."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keras_openllama.data.document_packing import (
    best_fit_decreasing,
    pack_documents,
    split_long_documents,
)

pytestmark = pytest.mark.backend_free

LENGTHS = st.lists(st.integers(2, 100), min_size=1, max_size=60).map(np.array)


@settings(max_examples=200, deadline=None)
@given(LENGTHS, st.integers(1, 40))
def test_split_long_documents_predicts_every_token_but_the_first_once(lengths, length):
    documents, starts, sizes = split_long_documents(lengths, length)
    for document, total in enumerate(lengths):
        predicted = []
        for start, size in zip(
            starts[documents == document], sizes[documents == document], strict=True
        ):
            predicted += range(start + 1, start + size)
        assert predicted == list(range(1, total))


@settings(max_examples=200, deadline=None)
@given(LENGTHS, st.integers(1, 40))
def test_pack_documents_cuts_no_document_that_fits_into_a_sequence(lengths, length):
    count, sequences, documents, starts, sizes = pack_documents(lengths, length)
    assert set(sequences.tolist()) == set(range(count))
    assert (np.bincount(sequences, sizes) <= length + 1).all()
    for document, total in enumerate(lengths):
        if total <= length + 1:
            [place] = np.flatnonzero(documents == document)
            assert (starts[place], sizes[place]) == (0, total)


def test_best_fit_chooses_the_bin_with_the_least_room_left():
    # 7 and 5 open bins. 4 fits best into the remaining 5 of the second bin, and 3 into
    # the remaining 3 of the first bin.
    sizes = np.array([3, 5, 7, 4])
    bins = best_fit_decreasing(sizes, 10)
    assert bins[0] == bins[2]
    assert bins[1] == bins[3]
    assert bins.max() == 1


def test_pack_documents_fills_sequences_to_more_than_99_percent():
    lengths = np.random.default_rng(0).lognormal(6.2, 1.1, 1024).astype(int) + 3
    count, *_ = pack_documents(lengths, 2048)
    assert (lengths - 1).sum() / (count * 2048) > 0.99


def test_pack_documents_without_predictions_makes_no_sequence():
    assert pack_documents(np.array([], "uint32"), 8)[0] == 0
    assert pack_documents(np.array([1]), 8)[0] == 0
