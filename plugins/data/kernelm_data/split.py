"""Split documents into train, validation and test: stratified by label, duplicates kept together.

The order in which documents are dealt out is a hash of seed and id, so that it hangs on no library's random generator
and on no other document.
"""

import hashlib
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

from kernelm_contracts.data import Split
from kernelm_sdk.errors import ClientFault

SPLITS = ("train", "validation", "test")


def shares(settings: Split) -> dict[str, float]:
    """Split -> its share of the documents, without those of share 0; ClientFault if they make no sense."""
    for field, value in (("validation", settings.validation), ("test", settings.test)):
        if not (math.isfinite(value) and 0 <= value < 1):
            raise ClientFault("invalid_split", f"split.{field}: {value} is no share of 0 or more and below 1",
                              "give shares such as validation = 0.1, test = 0.2")
    if settings.validation + settings.test >= 1:
        raise ClientFault("invalid_split", f"split: validation {settings.validation} and test {settings.test} leave nothing to "
                                           "train on", "let the two sum to less than 1")
    given = {"train": 1 - settings.validation - settings.test, "validation": settings.validation, "test": settings.test}
    return {name: share for name, share in given.items() if share > 0}


def check_classes(labels: Sequence[str], documents: Iterable[str], settings: Split, when: str) -> None:
    """ClientFault `class_too_small`, naming each class that has too few documents to be in every split.
    `documents`: the label of each."""
    needed = len(shares(settings))
    counts = Counter(documents)
    small = [f"{label!r} has {counts[label]}" for label in labels if counts[label] < needed]
    if small:
        raise ClientFault("class_too_small", f"{when}, class {', '.join(small)} document(s); it needs {needed}, one for each of "
                                             f"{', '.join(shares(settings))}",
                          "add documents to it, remove the class, or set split.validation or split.test to 0")


def quotas(documents: int, parts: dict[str, float]) -> dict[str, int]:
    """How many documents each split gets: largest remainders, and at least one each if there are enough."""
    exact = {name: documents * share for name, share in parts.items()}
    count = {name: math.floor(value + 1e-9) for name, value in exact.items()}
    by_remainder = sorted(parts, key=lambda name: (count[name] - exact[name], name))
    for name in by_remainder[: documents - sum(count.values())]:
        count[name] += 1
    for name in parts:
        if count[name] == 0 and documents >= len(parts):
            count[max(count, key=lambda other: (count[other], other))] -= 1
            count[name] = 1
    return count


def assign(ids: Sequence[str], labels: Sequence[str], links: Iterable[tuple[int, int]], settings: Split) -> list[str]:
    """The split of each document. `links`: pairs of positions that must not be torn apart. ClientFault if a class then
    can't be in every split."""
    parts = shares(settings)
    members: dict[int, list[int]] = defaultdict(list)
    for i, root in enumerate(_roots(len(ids), links)):
        members[root].append(i)
    of_label: dict[str, list[list[int]]] = defaultdict(list)
    for root, group in members.items():
        of_label[labels[root]].append(group)
    result = ["train"] * len(ids)
    for groups in of_label.values():
        groups.sort(key=lambda group: _rank(settings.seed, ids[group[0]]))
        left = quotas(sum(map(len, groups)), parts)
        for group in groups:
            # a group that fits nowhere whole goes to train
            name = next((n for n in ("test", "validation") if left.get(n, 0) >= len(group)), "train")
            left[name] -= len(group)
            for i in group:
                result[i] = name
    _check_presence(labels, result, parts)
    return result


def _rank(seed: int, id: str) -> bytes:
    return hashlib.blake2b(f"{seed}\0{id}".encode(), digest_size=16).digest()


def _roots(count: int, links: Iterable[tuple[int, int]]) -> list[int]:
    """For each position the smallest one that links lead to."""
    parent = list(range(count))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    for a, b in links:
        low, high = sorted((root(a), root(b)))
        parent[high] = low
    return [root(i) for i in range(count)]


def _check_presence(labels: Sequence[str], splits: Sequence[str], parts: dict[str, float]) -> None:
    present = set(zip(labels, splits, strict=True))
    missing = [f"{label!r} in {name}" for label in sorted(set(labels)) for name in parts if (label, name) not in present]
    if missing:
        raise ClientFault("class_too_small", f"no document of class {', '.join(missing)}: its duplicates, which stay together, "
                                             "leave too few groups", "drop duplicates (deduplicate.exact, .near) or add documents")
