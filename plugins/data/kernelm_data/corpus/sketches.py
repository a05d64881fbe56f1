"""What deduplication knows of a document: a hash of its text, a MinHash signature, keys of its bands."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import xxhash

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
        self._grams = np.empty(1 << 16, np.uint64)

    def grams(self, text: npt.NDArray[np.uint8], words: int = GRAM) -> k.Hashes:
        """Hashes of the word n-grams, with repetitions; valid until the next call."""
        if len(text) >= len(self._grams):
            self._grams = np.empty(2 << len(text).bit_length(), np.uint64)
        return self._grams[: k.shingles(text, k.ASCII, words, self._grams)]

    def signature(self, grams: k.Hashes, out: npt.NDArray[np.uint32]) -> None:
        k.sketch(grams, self._a, self._b, out)

    def shingles(self, text: npt.NDArray[np.uint8]) -> k.Hashes:
        """The set of shingles: sorted, distinct."""
        return np.unique(self.grams(text))


def keys(signatures: npt.NDArray[np.uint32], form: Shape) -> npt.NDArray[np.uint64]:
    """The band keys of each signature: documents x bands."""
    out = np.empty((len(signatures), form.bands), np.uint64)
    for i, signature in enumerate(signatures):
        k.band_keys(signature, form.rows, out[i])
    return out


def text_hash(text: bytes) -> bytes:
    """16 bytes of XXH3."""
    return xxhash.xxh3_128_digest(text)


def gram_table(grams: k.Hashes) -> k.Hashes:
    """A hash table of n-grams for `kernels.shares_any`."""
    table = np.zeros(1 << max((2 * len(grams)).bit_length(), 4), np.uint64)
    k.fill_table(grams, table)
    return table
