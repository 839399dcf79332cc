"""Random orders as pure functions of a key."""

import numpy as np
import pytest

from keras_openllama.data import shuffling
from keras_openllama.data.shuffling import BLOCK, GROUP, ShuffledOrder

pytestmark = pytest.mark.backend_free


def test_random_uint64_is_splitmix64():
    # The first outputs of the published generator for seed 1234567.
    assert shuffling.random_uint64(3, 1234567).tolist() == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
    ]


def test_permutation_is_complete_and_depends_on_the_key():
    one, other = (shuffling.permutation(10_000, key) for key in (1, 2))
    assert np.array_equal(np.sort(one), np.arange(10_000))
    assert np.array_equal(one, shuffling.permutation(10_000, 1))
    assert (one == other).sum() < 20


def test_permutation_is_uniform():
    # Position of the first of 10 elements over 5,000 keys: chi-squared with 9 degrees
    # of freedom exceeds 30 with a probability below 0.001.
    places = [int(np.argmin(shuffling.permutation(10, key))) for key in range(5000)]
    counts = np.bincount(places, minlength=10)
    assert ((counts - 500) ** 2 / 500).sum() < 30


def test_make_key_separates_its_parts():
    assert shuffling.make_key("a", 12) != shuffling.make_key("a1", 2)
    assert shuffling.make_key(1, "train") == 17168855842512317085


def test_shuffled_order_has_every_block_once_per_epoch_in_a_new_order():
    totals = np.random.default_rng(0).integers(1, 100, 1000)
    order = ShuffledOrder(totals, key=7)
    groups = -(-1000 // GROUP)
    epochs = [
        np.concatenate([order.blocks(epoch, group) for group in range(groups)])
        for epoch in (0, 1, 2)
    ]
    for blocks in epochs:
        assert np.array_equal(np.sort(blocks), np.arange(1000))
    assert not np.array_equal(epochs[0], epochs[1])
    assert np.array_equal(
        epochs[0], np.concatenate([order.blocks(0, group) for group in range(groups)])
    )


def test_shuffled_order_locates_every_position():
    totals = np.random.default_rng(0).integers(1, 9, 150)
    order = ShuffledOrder(totals, key=7)
    position = 0
    for epoch in (0, 1):
        for group in range(3):
            size = int(totals[order.blocks(epoch, group)].sum())
            for within in (0, size - 1):
                found = order.locate(position + within)
                assert found == (epoch, group, within)
            position += size
    assert position == 2 * order.total


def test_shuffled_order_of_a_billion_documents_needs_little_memory():
    blocks = 10**9 // BLOCK
    order = ShuffledOrder(np.full(blocks, 700 * BLOCK), key=1)
    epoch, group, _ = order.locate(200_000 * 2048 * 2048)
    assert (epoch, group) == (1, 3026)
    # 8 bytes for the total of each block, and 8 for its place in each cached epoch.
    assert order._totals.nbytes == 8 * blocks
