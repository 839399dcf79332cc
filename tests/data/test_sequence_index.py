"""Random access to sequences, with each document once per epoch."""

import collections
import types

import numpy as np
import pytest

from keras_openllama.data.sequence_index import BestFitIndex, ConcatenatedIndex
from keras_openllama.data.shuffling import BLOCK, GROUP

pytestmark = pytest.mark.backend_free

PACKINGS = [ConcatenatedIndex, BestFitIndex]


def random_documents(count, seed=0, low=3, high=60):
    """Documents of random lengths, without contents."""
    lengths = np.random.default_rng(seed).integers(low, high, count).astype("<u4")
    return types.SimpleNamespace(lengths=lengths)


def predicted(spans):
    """Tokens that a sequence predicts: all except its first."""
    tokens = [
        (document, first + i) for document, first, size in spans for i in range(size)
    ]
    return tokens[1:]


def test_concatenated_index_predicts_every_token_once_per_epoch():
    documents = random_documents(2 * BLOCK + 100)
    total = int(documents.lengths.sum())
    index = ConcatenatedIndex(documents, 50, key=1)
    tokens = [t for i in range(total // 50 + 1) for t in predicted(index.spans(i))]
    # The last sequence continues into the next epoch. The first token of the epoch
    # is an input but not a target.
    everything = {
        (d, i) for d, size in enumerate(documents.lengths) for i in range(size)
    }
    assert len(tokens[: total - 1]) == len(set(tokens[: total - 1]))
    [(_, place)] = everything - set(tokens[: total - 1])
    assert place == 0


def test_best_fit_index_has_every_document_once_per_epoch():
    documents = random_documents(2 * BLOCK + 100, high=120)
    index = BestFitIndex(documents, 50, key=1)
    epoch = int(index.sequences_per_epoch)
    for start in (0, epoch):
        spans = [s for i in range(start, start + epoch) for s in index.spans(i)]
        held = sorted(
            (document, first + i)
            for document, first, size in spans
            for i in range(1, size)
        )
        assert held == [
            (d, i) for d, size in enumerate(documents.lengths) for i in range(1, size)
        ]


@pytest.mark.parametrize("packing", PACKINGS)
def test_spans_differ_between_epochs_and_seeds(packing):
    documents = random_documents(BLOCK)
    index, other = packing(documents, 50, key=1), packing(documents, 50, key=2)
    epoch = int(index.sequences_per_epoch)
    first = [index.spans(i) for i in range(20)]
    assert first != [index.spans(epoch + i) for i in range(20)]
    assert first != [other.spans(i) for i in range(20)]
    assert first == [packing(documents, 50, key=1).spans(i) for i in range(20)]


@pytest.mark.parametrize("packing", PACKINGS)
def test_spans_do_not_depend_on_previous_reads(packing):
    # More than two groups, so that they are opened, dropped and opened again.
    documents = random_documents((2 * GROUP + 3) * BLOCK, high=12)
    index = packing(documents, 300, key=5)
    last = 3 * int(index.sequences_per_epoch)
    chosen = np.random.default_rng(1).integers(0, last, 12).tolist()
    found = {i: index.spans(i) for i in chosen}
    for i in sorted(chosen):
        assert packing(documents, 300, key=5).spans(i) == found[i]
        assert index.spans(i) == found[i]


def test_concatenated_index_continues_each_sequence_in_another_one():
    index = ConcatenatedIndex(random_documents(300), 17, key=3)
    epoch = int(index.sequences_per_epoch)
    spans = [index.spans(i) for i in range(2 * epoch)]  # Across two epochs.
    assert {sum(size for *_, size in parts) for parts in spans} == {18}
    starts = [parts[0][:2] for parts in spans]
    ends = [(document, first + size - 1) for *_, (document, first, size) in spans]
    # All except the first sequence of the first epoch and the last of the second.
    assert sum((collections.Counter(starts) - collections.Counter(ends)).values()) == 1
    assert starts[1:] != ends[:-1]


def test_concatenated_index_spreads_the_parts_of_a_long_document():
    documents = types.SimpleNamespace(lengths=np.full(100, 1000, "<u4"))
    index = ConcatenatedIndex(documents, 10, key=1)
    batch = {index.spans(i)[0][0] for i in range(5000, 5016)}
    assert len(batch) >= 10


def test_spans_of_long_documents_and_short_sources():
    documents = types.SimpleNamespace(lengths=np.array([1000], "<u4"))
    index = ConcatenatedIndex(documents, 100, key=0)
    assert sorted(index.spans(i) for i in range(10)) == [
        *([(0, start, 101)] for start in range(0, 900, 100)),
        [(0, 900, 100), (0, 0, 1)],
    ]
    tiny = types.SimpleNamespace(lengths=np.array([3], "<u4"))
    assert ConcatenatedIndex(tiny, 8, key=0).spans(0) == [(0, 0, 3)] * 3
    assert BestFitIndex(tiny, 8, key=0).spans(5) == [(0, 0, 3)]
    long = BestFitIndex(documents, 100, key=0)
    assert sorted(s for i in range(10) for s in long.spans(i)) == [
        (0, start, min(101, 1000 - start)) for start in range(0, 999, 100)
    ]


def test_concatenated_index_shuffles_documents_across_the_source():
    # Few neighbors in a sequence are neighbors in the source, and they come from all of
    # it: 64 blocks of a thousand.
    index = ConcatenatedIndex(random_documents(1000 * BLOCK, high=5), 2000, key=3)
    documents = np.array([document for document, *_ in index.spans(0)])
    assert (np.abs(np.diff(documents)) == 1).mean() < 0.01
    assert len(set((documents // BLOCK).tolist())) > 0.9 * GROUP
    assert documents.std() > 0.2 * 1000 * BLOCK


def test_best_fit_index_caches_the_number_of_sequences(tmp_path):
    documents = random_documents(3 * BLOCK)
    cache = str(tmp_path / "train.rows-50")
    index = BestFitIndex(documents, 50, key=1, cache=cache)
    cached = np.fromfile(cache, "<u4")
    assert cached.sum() == index.sequences_per_epoch
    # A cache for the same number of blocks is trusted. Otherwise it is recomputed.
    (cached + 1).astype("<u4").tofile(cache)
    assert (
        BestFitIndex(documents, 50, key=1, cache=cache).sequences_per_epoch
        == cached.sum() + 3
    )
    cached[:2].tofile(cache)
    assert (
        BestFitIndex(documents, 50, key=1, cache=cache).sequences_per_epoch
        == cached.sum()
    )


def test_spans_never_change_between_versions():
    # Runs of other versions can be resumed with this one.
    lengths = (3 + np.arange(5 * BLOCK) * 7 % 57).astype("<u4")
    documents = types.SimpleNamespace(lengths=lengths)
    assert ConcatenatedIndex(documents, 50, key=1).spans(1000) == [
        (484, 14, 14),
        (1439, 0, 37),
    ]
    assert BestFitIndex(documents, 50, key=1).spans(1000) == [(144, 0, 42), (408, 0, 9)]
