"""Deduplication over all shards, and the split of every document that stays.

Exact duplicates by the hash of the text; near ones by MinHash LSH, whose every candidate is judged by its exact Jaccard similarity.
Documents are looked at in order, each compared with those kept so far: so of a group of near duplicates the first stays, and no two
that stay are near. What other datasets hold (`against`, earlier versions) comes first and is never stored again.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import xxhash

from kernelm_contracts.data import Deduplicate, Split
from kernelm_data.corpus import kernels
from kernelm_data.corpus.books import Lost, StepBook
from kernelm_data.corpus.sketches import Shape, Sketcher, band_keys
from kernelm_data.corpus.store import Documents
from kernelm_data.split import shares

DROPPED = 255
SPLITS = ("train", "validation", "test")
MARGIN = 0.2  # an estimate of 128 permutations that is so far below the threshold is 5 standard deviations off
MOST = 64  # candidates, those first whose estimate is highest, whose exact similarity is computed
HOLDERS = 8192  # kept documents of one band that are candidates at all: beyond, a band tells nothing
CACHE = 256_000_000  # bytes of shingles that are kept for comparisons
LOOKED = 64_000_000  # bytes looked at after which their memory is given back
AROUND = 65_536  # bytes that the system brings along with whatever is looked at (fault_around_bytes)


Signatures = Sequence[npt.NDArray[np.uint32]]  # documents x permutations, one after the other


class Shingles:
    """The shingles of documents, those last asked for kept."""

    def __init__(self, documents: Callable[[int], npt.NDArray[np.uint8]], permutations: int) -> None:
        self._text, self._sketcher = documents, Sketcher(permutations)
        self._cache: dict[int, kernels.Hashes] = {}
        self._bytes = 0

    def __getitem__(self, document: int) -> kernels.Hashes:
        found = self._cache.get(document)
        if found is None:
            found = self._cache[document] = self._sketcher.shingles(self._text(document))
            self._bytes += found.nbytes
            while self._bytes > CACHE:
                self._bytes -= self._cache.pop(next(iter(self._cache))).nbytes
        return found


class Outcome(NamedTuple):
    """What deduplication found out."""

    assigned: list[npt.NDArray[np.uint8]]  # of each shard: the split of each document, by position in SPLITS, or DROPPED
    exact: StepBook
    near: StepBook
    lost: Lost


def exact_roots(hashes: npt.NDArray[np.void]) -> npt.NDArray[np.int64]:
    """For each document the first one with the same text."""
    _, first, inverse = np.unique(hashes, return_index=True, return_inverse=True)
    return first[inverse.ravel()].astype(np.int64)


def shared_bands(parts: Signatures, members: npt.NDArray[np.int64], form: Shape) -> dict[int, list[int]]:
    """For each of the members that has a band in common with another: the numbers of those bands. One band at a time, so that
    the signatures need not be in memory."""
    result: dict[int, list[int]] = {}
    number = 0
    for band in range(form.bands):
        _, inverse, counts = np.unique(band_keys(parts, band, form)[members], return_inverse=True, return_counts=True)
        many = np.flatnonzero(counts[inverse] > 1)
        for position, group in zip(many.tolist(), inverse[many].tolist(), strict=True):
            result.setdefault(position, []).append(number + group)
        number += len(counts)
    return {int(members[position]): groups for position, groups in sorted(result.items())}


def gathered(parts: Signatures, documents: npt.NDArray[np.int64]) -> npt.NDArray[np.uint32]:
    """The signatures of some documents, whose numbers rise."""
    ends = np.cumsum([len(part) for part in parts])
    cuts = np.searchsorted(documents, ends)
    found = [part[documents[low:high] - (end - len(part))]
             for part, end, low, high in zip(parts, ends, [0, *cuts[:-1]], cuts, strict=True)]  # fmt: skip
    return np.concatenate(found)


def near_roots(parts: Signatures, members: npt.NDArray[np.int64], settings: Deduplicate, form: Shape,
               shingles: Shingles, at: Callable[[int, int], None]) -> dict[int, tuple[int, float]]:  # fmt: skip
    """Document -> the kept one it is nearest to, and their similarity. `at`: is told how many of how many are through."""
    bands = shared_bands(parts, members, form)
    if not bands:
        return {}
    documents = np.fromiter(bands, np.int64, len(bands))
    signatures = gathered(parts, documents)
    kept: dict[int, list[int]] = {}  # band -> positions in `documents`
    near: dict[int, tuple[int, float]] = {}
    least = settings.jaccard - MARGIN
    for position, (document, groups) in enumerate(bands.items()):
        if position % 1024 == 0:
            at(position, len(bands))
        candidates = np.array(sorted({other for group in groups for other in kept.get(group, ())}), np.int64)
        best: tuple[int, float] | None = None
        if candidates.size:
            alike = (signatures[candidates] == signatures[position]).mean(axis=1)
            order = np.argsort(-alike, kind="stable")[:MOST]
            for other in np.sort(candidates[order[alike[order] >= least]]).tolist():
                similarity = kernels.jaccard(shingles[int(documents[other])], shingles[document])
                if similarity >= settings.jaccard and (best is None or similarity > best[1]):
                    best = (int(documents[other]), similarity)
        if best is not None:
            near[document] = best
        if best is None or not settings.near:
            for group in groups:
                holders = kept.setdefault(group, [])
                if len(holders) < HOLDERS:
                    holders.append(position)
    at(len(bands), len(bands))
    return near


def deduplicate(shards: Sequence[Path], others: int, settings: Deduplicate, split: Split, form: Shape,
                at: Callable[[int, int], None]) -> Outcome:  # fmt: skip
    """Over the `docs.arrow` of all shards, of which the first `others` are of other datasets."""
    files = [Documents(path) for path in shards]
    starts = np.cumsum([0, *map(len, files)])

    def place(document: int) -> tuple[int, int]:
        shard = int(np.searchsorted(starts, document, "right")) - 1
        return shard, document - int(starts[shard])

    looked = 0

    def text(document: int) -> npt.NDArray[np.uint8]:
        nonlocal looked
        if looked > LOOKED:
            looked = 0
            for file in files:
                file.release()
        shard, row = place(document)
        found = files[shard].text(row)
        looked += found.nbytes + AROUND
        return found

    def id_of(document: int) -> str:
        shard, row = place(document)
        return files[shard].id(row)

    old = int(starts[others])
    total = int(starts[-1])
    exact, near, lost = StepBook("deduplicate exact"), StepBook("deduplicate near"), Lost()
    root = exact_roots(np.concatenate([file.hashes() for file in files])) if total else np.empty(0, np.int64)
    stays = np.ones(total, np.bool_)
    exact.documents_in = total - old
    for document in np.flatnonzero(root[old:] != np.arange(old, total)).tolist():
        document += old
        first = int(root[document])
        if settings.exact or first < old:
            stays[document] = False
            why = "duplicate" if first >= old else "duplicate of another dataset"
            exact.drop(why)
            lost.add(id_of(document), exact.name, why, kept=id_of(first))
    exact.documents_out = near.documents_in = int(stays[old:].sum())

    if settings.near or not settings.exact or split.validation + split.test > 0:
        members = np.flatnonzero(stays & (root == np.arange(total)))
        parts = [part for file in files for part in file.signatures(len_of(form, settings))]
        shingles = Shingles(text, settings.permutations)
        for document, (other, similarity) in near_roots(parts, members, settings, form, shingles, at).items():
            root[document] = root[other]
            if document >= old and (settings.near or other < old):
                stays[document] = False
                why = "near duplicate" if other >= old else "near duplicate of another dataset"
                near.drop(why)
                lost.add(id_of(document), near.name, why, kept=id_of(other), jaccard=similarity)
    near.documents_out = int(stays[old:].sum())
    assigned = np.where(stays, np.uint8(0), np.uint8(DROPPED))
    if len(shares(split)) > 1:
        of = np.fromiter((split_of(id, split) for file in files for id in file.ids()), np.uint8, total)
        assigned[stays] = of[root[stays]]
    return Outcome([assigned[starts[i] : starts[i + 1]] for i in range(others, len(files))], exact, near, lost)


def len_of(form: Shape, settings: Deduplicate) -> int:
    """Values of a signature; a few beyond the bands may serve the estimate only."""
    return max(settings.permutations, form.bands * form.rows)


def split_of(id: str, split: Split) -> int:
    """The split of a document and its duplicates: a hash of the seed and the first one's id, so that it hangs on no other
    document."""
    rank = xxhash.xxh3_64_intdigest(f"{split.seed}\0{id}".encode()) / 2**64
    parts = shares(split)
    if rank < parts.get("test", 0.0):
        return 2
    return 1 if rank < parts.get("test", 0.0) + parts.get("validation", 0.0) else 0
