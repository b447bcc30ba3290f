"""Random numbers as a function of a key and a place, by SplitMix64.

The generator is that of Steele, Lea and Flood, OOPSLA 2014. numpy.random is not used, because its
streams may change between versions.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from imagenet_seq.index.columns import IntArray
from imagenet_seq.plan.arrays import index_dtype, slices

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_FACTORS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


def hash_words(*words: int) -> int:
    """Hash integers into a 64-bit key."""
    key = 0
    for word in words:
        key = ((key ^ word) + _GOLDEN) & _MASK
        key = ((key ^ key >> 30) * _FACTORS[0]) & _MASK
        key = ((key ^ key >> 27) * _FACTORS[1]) & _MASK
        key ^= key >> 31
    return key


def mixed(words: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Return each word mixed as `hash_words` does it."""
    return _finalise(words + np.uint64(_GOLDEN))


def splitmix(place: npt.NDArray[np.uint64], key: int) -> npt.NDArray[np.uint64]:
    """Return output number `place` of the generator seeded with `key`."""
    state = (place + np.uint64(1)) * np.uint64(_GOLDEN)
    state += np.uint64(key)
    return _finalise(state)


def _finalise(words: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Mix words in place."""
    for shift, factor in zip((30, 27), _FACTORS, strict=True):
        words ^= words >> np.uint64(shift)
        words *= np.uint64(factor)
    words ^= words >> np.uint64(31)
    return words


def permutation(size: int, key: int) -> IntArray:
    """Return a permutation of range(size): places sorted by random numbers.

    A place is the low bits of its own sort key, so sorting the keys alone is enough.
    """
    low = np.uint64((1 << max(size - 1, 0).bit_length()) - 1)
    keys = np.empty(size, np.uint64)
    for part in slices(size):
        place = np.arange(part.start, part.stop, dtype=np.uint64)
        keys[part] = (splitmix(place, key) & ~low) | place
    keys.sort()
    keys &= low
    return keys.astype(index_dtype(size))
