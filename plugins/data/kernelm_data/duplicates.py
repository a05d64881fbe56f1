"""Duplicates: exact ones by a hash of the clean text, near ones by MinHash LSH, every candidate verified.

Near means: the sets of word 5-grams have a Jaccard similarity of at least the threshold (Broder, "On the resemblance and
containment of documents", 1997). LSH (Indyk and Motwani, 1998) finds the candidates, their exact similarity decides.
"""

import hashlib
import re
from collections.abc import Sequence

import msgspec
import numpy as np
import numpy.typing as npt
from rensa import RMinHash, RMinHashLSH

from kernelm_contracts.data import Deduplicate
from kernelm_data.account import Document, Meter
from kernelm_sdk.errors import ClientFault

Shingles = npt.NDArray[np.uint64]  # the sorted, distinct 64-bit hashes of a document's n-grams

GRAM = 5  # words
SEED = 0  # of the permutations; which near duplicates are found must not hang on the split's seed
CHUNK = 256  # documents sketched in one call
MAX_MISS = 1e-4  # probability that LSH misses a pair whose similarity is just the threshold
# ideographs, kana and Thai are written without blanks: each character counts as a word
UNSPACED = r"\u0e00-\u0e7f\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
WORD = re.compile(rf"[{UNSPACED}]|[^\W{UNSPACED}]+")


class Pair(msgspec.Struct, frozen=True):
    """Two near duplicates, by position; `first` < `second`."""

    first: int
    second: int
    jaccard: float


def find_exact(documents: Sequence[Document]) -> dict[int, int]:
    """Position of each document whose text was there before -> position of the first with that text."""
    first: dict[bytes, int] = {}
    copies = {}
    for i, document in enumerate(documents):
        if (original := first.setdefault(hashlib.sha256(document.text.encode()).digest(), i)) != i:
            copies[i] = original
    return copies


def grams(text: str) -> list[str]:
    """The word 5-grams of a text, without case or punctuation; of fewer words, all of them as one."""
    words = WORD.findall(text.casefold()) or [text]
    return [" ".join(words[i : i + GRAM]) for i in range(max(1, len(words) - GRAM + 1))]


def bands(threshold: float, permutations: int) -> int:
    """How many bands LSH cuts a signature into: as few as miss a pair at the threshold with probability MAX_MISS at most.
    A band of r values matches with probability s**r, so b of them miss with (1 - s**r)**b."""
    for rows in range(permutations, 0, -1):
        if permutations % rows == 0 and (1 - threshold**rows) ** (permutations // rows) <= MAX_MISS:
            return permutations // rows
    raise ClientFault("invalid", f"deduplicate.permutations: {permutations} are too few to find pairs at a Jaccard similarity "
                                 f"of {threshold}", "give 128 or more, or a higher deduplicate.jaccard")


def jaccard(a: Shingles, b: Shingles) -> float:
    """Exact Jaccard similarity of two sets."""
    common = np.intersect1d(a, b, assume_unique=True).size
    return common / (a.size + b.size - common)


def find_near(documents: Sequence[Document], settings: Deduplicate, meter: Meter) -> tuple[list[Pair], list[Shingles]]:
    """Near duplicates among documents with distinct texts, in order, and the shingles of all documents.

    With `settings.near` every document is compared with those kept so far, and a pair names the most similar of them: so
    `second` is to be dropped, and no two of the rest are near. Without it all pairs are found, so that the split can keep
    them together.
    """
    index = RMinHashLSH(settings.jaccard, settings.permutations, bands(settings.jaccard, settings.permutations))
    pairs: list[Pair] = []
    shingles: list[Shingles] = []
    meter.at(0)
    for start in range(0, len(documents), CHUNK):
        token_sets = [grams(d.text) for d in documents[start : start + CHUNK]]
        shingles += [np.unique(np.asarray(h, np.uint64)) for h in RMinHash.hash_token_sets(token_sets)]
        for i, sketch in enumerate(RMinHash.from_token_sets(token_sets, settings.permutations, SEED), start):
            scored = [Pair(k, i, jaccard(shingles[k], shingles[i])) for k in sorted(index.query(sketch))]
            near = [pair for pair in scored if pair.jaccard >= settings.jaccard]
            if near and settings.near:
                pairs.append(max(near, key=lambda pair: (pair.jaccard, -pair.first)))
                continue
            pairs += near
            index.insert(i, sketch)
        meter.at(len(shingles))
    return pairs, shingles
