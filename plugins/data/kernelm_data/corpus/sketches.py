"""What deduplication knows of a document: a hash of its text, a MinHash signature, keys of its bands."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import xxhash
from numba import njit

from kernelm_data.corpus import kernels as k

GRAM = 5  # words of a shingle
MAX_MISS = 1e-4  # probability that LSH misses a pair whose similarity is just the threshold
SEED = 20_010_101  # of the permutations; which documents are near must not hang on the split's seed


class Shape(NamedTuple):
    """Bands and rows of a signature."""

    bands: int
    rows: int


def shape(threshold: float, permutations: int) -> Shape:
    """As few bands as miss a pair at the threshold with probability MAX_MISS at most: a band of r values matches with probability
    s^r, so b of them miss with (1 - s^r)^b. ValueError if there are too few permutations."""
    for rows in range(permutations, 0, -1):
        if (1 - threshold**rows) ** (permutations // rows) <= MAX_MISS:
            return Shape(permutations // rows, rows)
    raise ValueError(f"{permutations} permutations are too few for a similarity of {threshold}")


class Sketcher:
    """Hashes, shingles and signatures of one text after another."""

    def __init__(self, permutations: int) -> None:
        random = np.random.default_rng(SEED)
        self._a = random.integers(0, 1 << 32, permutations, dtype=np.uint32) | np.uint32(1)
        self._b = random.integers(0, 1 << 32, permutations, dtype=np.uint32)
        self._room(1 << 16)

    def _room(self, size: int) -> None:
        self._grams, self._bounds = np.empty(size + 1, np.uint64), np.empty(2 * size + 2, np.int64)

    def grams(self, text: npt.NDArray[np.uint8], words: int = GRAM) -> k.Hashes:
        """Hashes of the word n-grams, with repetitions; valid until the next call."""
        if len(text) >= len(self._grams):
            self._room(1 << len(text).bit_length())
        found = k.word_bounds(text, k.ASCII, self._bounds)
        return self._grams[: k.shingles(text, self._bounds, found, words, self._grams)]

    def signature(self, grams: k.Hashes, out: npt.NDArray[np.uint32]) -> None:
        k.sketch(grams, self._a, self._b, out)

    def shingles(self, text: npt.NDArray[np.uint8]) -> k.Hashes:
        """The set of shingles: sorted, distinct."""
        grams = self.grams(text).copy()
        grams.sort()
        return grams[: k.distinct(grams)]


def band_keys(parts: Sequence[npt.NDArray[np.uint32]], band: int, form: Shape) -> k.Hashes:
    """The key of a band of every signature; `parts`: documents x permutations, one after the other."""
    out = np.empty(sum(map(len, parts)), np.uint64)
    at = 0
    for part in parts:
        k.band_keys(part, band, form.rows, out[at : at + len(part)])
        at += len(part)
    return out


def text_hash(text: bytes) -> bytes:
    """16 bytes of XXH3."""
    return xxhash.xxh3_128_digest(text)


@njit(cache=True, nogil=True)
def shares_any(grams: k.Hashes, table: k.Hashes) -> bool:
    """Whether any of the n-grams is in the hash table of `gram_table`."""
    mask = np.uint64(len(table) - 1)
    for g in grams:
        slot = g & mask
        while table[slot] != k.ZERO:
            if table[slot] == g:
                return True
            slot = (slot + k.ONE) & mask
    return False


@njit(cache=True, nogil=True)
def fill_table(grams: k.Hashes, table: k.Hashes) -> None:
    """Put n-grams into an open table, whose size is a power of two and at least twice their number."""
    mask = np.uint64(len(table) - 1)
    for g in grams:
        slot = g & mask
        while table[slot] != k.ZERO and table[slot] != g:
            slot = (slot + k.ONE) & mask
        table[slot] = g


def gram_table(grams: k.Hashes) -> k.Hashes:
    """A hash table of n-grams for `shares_any`."""
    table = np.zeros(1 << max((2 * len(grams)).bit_length(), 4), np.uint64)
    fill_table(grams, table)
    return table
