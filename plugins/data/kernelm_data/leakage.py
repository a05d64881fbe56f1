"""Leakage: no document of one split may be a near duplicate of one in another.

This does not trust LSH, which misses a pair now and then: it finds every pair by prefix filtering (Bayardo, Ma and Srikant,
"Scaling up all pairs similarity search", 2007). Two sets of a Jaccard similarity of t or more share one of the first
|x| - ceil(t |x|) + 1 elements, if both are sorted in the same order; with the rare elements first, few other sets do.
"""

import math
from collections.abc import Iterator, Sequence

import numpy as np

from kernelm_data.account import Meter
from kernelm_data.duplicates import Pair, Shingles, jaccard
from kernelm_sdk.errors import PluginFault


def near_pairs(sets: Sequence[Shingles], threshold: float, meter: Meter | None = None) -> Iterator[Pair]:
    """Every pair of sets with a Jaccard similarity of `threshold` or more, by position."""
    if not sets:
        return
    elements, counts = np.unique(np.concatenate(sets), return_counts=True)
    index: dict[int, list[int]] = {}
    for i, members in enumerate(meter.track(sets) if meter else sets):
        frequency = counts[np.searchsorted(elements, members)]
        length = members.size - math.ceil(threshold * members.size - 1e-9) + 1
        prefix = np.lexsort((members, frequency))[:length]
        shared = members[prefix[frequency[prefix] > 1]].tolist()  # an element that only one set has joins no pair
        for k in sorted({k for element in shared for k in index.get(element, ())}):
            if min(sets[k].size, members.size) >= threshold * max(sets[k].size, members.size) - 1e-9:
                similarity = jaccard(sets[k], members)
                if similarity >= threshold:
                    yield Pair(k, i, similarity)
        for element in shared:
            index.setdefault(element, []).append(i)


def check_leakage(ids: Sequence[str], splits: Sequence[str], sets: Sequence[Shingles], threshold: float, meter: Meter) -> None:
    """PluginFault `leakage`, naming the documents, if two splits hold near duplicates of each other."""
    for pair in near_pairs(sets, threshold, meter):
        one, other = splits[pair.first], splits[pair.second]
        if one != other:
            raise PluginFault("leakage", f"{ids[pair.first]} in {one} and {ids[pair.second]} in {other} are near duplicates "
                                         f"(Jaccard {pair.jaccard:.3f}) that MinHash did not find",
                              "raise deduplicate.permutations, e.g. to 256; nothing was stored")
