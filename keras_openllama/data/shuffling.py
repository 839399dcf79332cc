"""Random orders that are pure functions of a key and never change.

NumPy may change the streams of its generators between versions. So orders come from a
hash that is defined here, and a run can be resumed with any later version.
"""

import hashlib

import numpy as np

# Heuristic: documents per block, and blocks per group. 65,536 documents from 64 places
# of the source are shuffled together.
BLOCK = 1024
GROUP = 64

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def make_key(*parts: str | int) -> int:
    """Hashes strings and numbers to a 64-bit key.

    Example:
        >>> make_key(1, "train")
        17168855842512317085
    """
    digest = hashlib.blake2b("\0".join(map(str, parts)).encode(), digest_size=8)
    return int.from_bytes(digest.digest(), "little")


def random_uint64(count: int, key: int) -> np.ndarray:
    """Generates distinct pseudo-random numbers.

    Args:
        count: how many.
        key: seed, below 2**64.

    Returns:
        uint64 array `(count,)`.

    Source: SplitMix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number
    generators", OOPSLA 2014).

    Example:
        >>> random_uint64(2, key=1234567).tolist()
        [6457827717110365317, 3203168211198807973]
    """
    x = np.arange(1, count + 1, dtype="uint64")
    x *= _GOLDEN  # Wraps at 2**64, as intended.
    x += np.uint64(key)
    x ^= x >> np.uint64(30)
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x


def permutation(count: int, key: int) -> np.ndarray:
    """Generates a random permutation.

    Args:
        count: number of elements.
        key: seed, below 2**64.

    Returns:
        int64 array `(count,)`.

    Example:
        >>> permutation(5, key=1).tolist()
        [4, 3, 0, 1, 2]
    """
    return np.argsort(random_uint64(count, key))


class ShuffledOrder:
    """A shuffled order of the documents of a source, for every epoch.

    Blocks of consecutive documents are shuffled, and each `GROUP` blocks form a group,
    whose documents are shuffled again. So locating a position needs one number per
    block.

    Args:
        totals: int64 array `(blocks,)`: tokens or sequences of each block.
        key: see `make_key`.

    Attributes:
        total: tokens or sequences per epoch.
    """

    def __init__(self, totals: np.ndarray, key: int):
        self._totals, self._key = totals, key
        self.total = int(totals.sum())
        self._epochs = {}

    def locate(self, position: int) -> tuple[int, int, int]:
        """Finds a position in the endless stream of epochs.

        Args:
            position: in tokens or sequences, as the totals.

        Returns:
            Epoch, group, and position in the group.
        """
        epoch, within = divmod(position, self.total)
        _, ends = self._epoch(epoch)
        group = int(np.searchsorted(ends, within, side="right"))
        return epoch, group, within - (int(ends[group - 1]) if group else 0)

    def blocks(self, epoch: int, group: int) -> np.ndarray:
        """The blocks of a group: int64 array of at most `GROUP` indices."""
        order, _ = self._epoch(epoch)
        return order[group * GROUP : (group + 1) * GROUP]

    def group_key(self, epoch: int, group: int) -> int:
        """The key for shuffling the contents of a group."""
        return make_key(self._key, epoch, group)

    def _epoch(self, epoch):
        """The order of the blocks, and the end of each group."""
        if epoch not in self._epochs:
            order = permutation(len(self._totals), make_key(self._key, epoch))
            sums = np.add.reduceat(self._totals[order], np.arange(0, len(order), GROUP))
            while (
                len(self._epochs) > 1
            ):  # The previous epoch is needed at its end only.
                self._epochs.pop(next(iter(self._epochs)))
            self._epochs[epoch] = order, np.cumsum(sums)
        return self._epochs[epoch]
