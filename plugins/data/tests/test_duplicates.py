"""Near duplicates and splits against exact, slow references."""

import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from kernelm_contracts.data import Clean, Deduplicate, Split
from kernelm_data.account import Document, Meter
from kernelm_data.clean import cleaner
from kernelm_data.decode import decode
from kernelm_data.duplicates import find_exact, find_near
from kernelm_data.leakage import check_leakage, near_pairs
from kernelm_data.split import assign, quotas
from kernelm_sdk.errors import ClientFault, PluginFault


def meter() -> Meter:
    return Meter(lambda *report: None, "test", (0.0, 1.0), 1)


@pytest.fixture(scope="module")
def distinct(news: Path) -> list[Document]:
    """BBC News without exact duplicates."""
    clean = cleaner(Clean())
    documents = [Document(str(path), path.parent.name, clean(decode(path.read_bytes())[0])[0])
                 for path in sorted(news.glob("*/*.txt"))]  # fmt: skip
    copies = find_exact(documents)
    assert len(copies) == 98
    return [d for i, d in enumerate(documents) if i not in copies]


@pytest.fixture(scope="module")
def truth(distinct: list[Document], exact_pairs) -> dict[tuple[int, int], float]:
    """The exact similarity of every pair at or above 0.5."""
    return exact_pairs([d.text for d in distinct], 0.5)


@pytest.mark.parametrize("threshold", [0.5, 0.8, 0.95])
def test_minhash_finds_every_pair_of_bbc_news(distinct, truth, threshold):
    wanted = {pair: similarity for pair, similarity in truth.items() if similarity >= threshold}
    pairs, _ = find_near(distinct, Deduplicate(near=False, jaccard=threshold), meter())
    assert {(p.first, p.second): p.jaccard for p in pairs} == wanted
    assert wanted


def test_dropping_leaves_no_pair_and_drops_only_duplicates_of_what_stays(distinct, truth):
    pairs, _ = find_near(distinct, Deduplicate(), meter())
    gone = {pair.second for pair in pairs}
    assert gone.isdisjoint(pair.first for pair in pairs)
    assert not [pair for pair, similarity in truth.items() if similarity >= 0.8 and gone.isdisjoint(pair)]
    assert all(truth[pair.first, pair.second] == pair.jaccard for pair in pairs)


@pytest.mark.parametrize("threshold", [0.5, 0.7, 0.8, 1.0])
def test_prefix_filter_is_exact(threshold):
    random_ = random.Random(0)
    sets = [np.unique(np.array(random_.sample(range(40), random_.randrange(1, 20)), np.uint64)) for _ in range(150)]
    plain = [set(members.tolist()) for members in sets]
    exact = {(i, j) for j in range(150) for i in range(j) if len(plain[i] & plain[j]) / len(plain[i] | plain[j]) >= threshold}
    assert {(p.first, p.second) for p in near_pairs(sets, threshold)} == exact
    assert exact


def test_leakage_is_a_fault_that_names_both():
    sets = [np.arange(10, dtype=np.uint64), np.arange(100, 110, dtype=np.uint64), np.arange(1, 11, dtype=np.uint64)]
    check_leakage(["a", "b", "c"], ["train", "test", "train"], sets, 0.8, meter())
    with pytest.raises(PluginFault, match="a in train and c in test"):
        check_leakage(["a", "b", "c"], ["train", "train", "test"], sets, 0.8, meter())


@pytest.mark.parametrize(("documents", "expected"), [
    (100, (70, 10, 20)), (2127, (1489, 213, 425)), (3, (1, 1, 1)), (4, (2, 1, 1)), (5, (3, 1, 1)), (2, (1, 0, 1)),
])  # fmt: skip
def test_quotas(documents, expected):
    count = quotas(documents, {"train": 0.7, "validation": 0.1, "test": 0.2})
    assert sum(count.values()) == documents
    if documents > 2:
        assert (count["train"], count["validation"], count["test"]) == expected


def test_linked_documents_share_a_split_and_the_shares_hold():
    ids = [f"{i}" for i in range(300)]
    labels = ["a" if i < 200 else "b" for i in range(300)]
    links = [(i, i + 1) for i in range(0, 60, 3)] + [(i + 1, i + 2) for i in range(0, 60, 3)]  # chains of three
    splits = assign(ids, labels, links, Split())
    assert all(splits[a] == splits[b] for a, b in links)
    assert abs(Counter(splits)["test"] - 60) <= 2
    assert splits == assign(ids, labels, links, Split())


def test_a_group_too_large_for_a_split_is_named():
    with pytest.raises(ClientFault, match="'a' in validation") as caught:
        assign([f"{i}" for i in range(10)], ["a"] * 10, [(0, i) for i in range(1, 9)], Split(validation=0.3, test=0.3))
    assert caught.value.code == "class_too_small"


def test_split_of_a_document_does_not_hang_on_other_classes():
    ids, labels = [f"a{i}" for i in range(50)], ["a"] * 50
    alone = assign(ids, labels, [], Split())
    beside = assign([*ids, *(f"b{i}" for i in range(30))], [*labels, *["b"] * 30], [], Split())
    assert beside[:50] == alone
