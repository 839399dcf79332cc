"""Random orders that are pure functions of a key, and stay the same for ever.

NumPy may change the streams of its generators between versions, so orders come from a
hash that is defined here: a run can be resumed years later.
"""

import hashlib

import numpy as np

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
