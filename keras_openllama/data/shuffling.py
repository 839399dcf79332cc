"""Random orders that are pure functions of a key, and stay the same for ever.

NumPy may change the streams of its generators between versions, so orders come from a
hash that is defined here: a run can be resumed years later.
"""

import hashlib

import numpy as np

# Ours: documents in a block, and blocks in a group. 65,536 documents are shuffled
# together, from 64 places of the source.
BLOCK = 1024
GROUP = 64

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def key(*parts):
    """A 64-bit key (int) of strings and numbers."""
    digest = hashlib.blake2b("\0".join(map(str, parts)).encode(), digest_size=8)
    return int.from_bytes(digest.digest(), "little")


def random_uint64(count, key):
    """Pseudo-random numbers, no two the same.

    Args:
        count: int, how many.
        key: int below 2**64.

    Returns:
        uint64 array `(count,)`.

    Source: SplitMix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number
    generators", OOPSLA 2014).
    """
    x = np.arange(1, count + 1, dtype="uint64")
    x *= _GOLDEN  # Wraps at 2**64, as it should.
    x += np.uint64(key)
    x ^= x >> np.uint64(30)
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x


def permutation(count, key):
    """A random order of `count` things: int64 array `(count,)`."""
    return np.argsort(random_uint64(count, key))


class Order:
    """A shuffled order of the documents of a source, for every epoch.

    Blocks of consecutive documents are put into random order, and so many blocks at a
    time make a group, whose documents are shuffled again. So what must be known to find
    a place is one number a block.

    Args:
        totals: int64 array `(blocks,)`, what each block holds: tokens, or rows.
        key: int, see `key`.

    Attributes:
        total: int, what an epoch holds.
    """

    def __init__(self, totals, key):
        self._totals, self._key = totals, key
        self.total = int(totals.sum())
        self._epochs = {}

    def locate(self, position):
        """Where something of the endless stream of epochs is.

        Args:
            position: int, in units of the totals.

        Returns:
            Epoch, group, and position in the group: ints.
        """
        epoch, within = divmod(position, self.total)
        _, ends = self._epoch(epoch)
        group = int(np.searchsorted(ends, within, side="right"))
        return epoch, group, within - (int(ends[group - 1]) if group else 0)

    def blocks(self, epoch, group):
        """The blocks of a group: int64 array of at most `GROUP` numbers."""
        order, _ = self._epoch(epoch)
        return order[group * GROUP : (group + 1) * GROUP]

    def key_of(self, epoch, group):
        """The key (int) by which what is in a group is shuffled."""
        return key(self._key, epoch, group)

    def _epoch(self, epoch):
        """The order of the blocks, and where each group ends."""
        if epoch not in self._epochs:
            order = permutation(len(self._totals), key(self._key, epoch))
            sums = np.add.reduceat(self._totals[order], np.arange(0, len(order), GROUP))
            while len(self._epochs) > 1:  # The one before is read at the border only.
                self._epochs.pop(next(iter(self._epochs)))
            self._epochs[epoch] = order, np.cumsum(sums)
        return self._epochs[epoch]
