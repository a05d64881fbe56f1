"""The index: what is found is what an exhaustive comparison finds, and a broken one is refused by file."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from kernelm_contracts.retriever import IndexCard
from kernelm_retriever.index import CARD, PASSAGES, VECTORS, Index, unit, write
from kernelm_retriever.passages import Passage
from kernelm_sdk.errors import ClientFault

DOCUMENTS, EACH, DIMENSIONS = 20, 5, 16


@pytest.fixture
def vectors() -> np.ndarray:
    return unit(np.random.default_rng(0).normal(size=(DOCUMENTS * EACH, DIMENSIONS)).astype(np.float32))


@pytest.fixture
def folder(tmp_path: Path, vectors: np.ndarray) -> Path:
    parts = [Passage(f"d{k:02}", f"title {k}", f"passage {j} of {k}", "label") for k in range(DOCUMENTS) for j in range(EACH)]
    card = IndexCard("test", DOCUMENTS, len(parts), DIMENSIONS, "vectors", "sha256:m", "sha256:d", 120)
    write(tmp_path, card, parts, vectors)
    return tmp_path


def test_search_is_exact_and_best_first(folder: Path, vectors: np.ndarray) -> None:
    index, random = Index.load(folder), np.random.default_rng(1)
    for _ in range(20):
        asked = unit(random.normal(size=DIMENSIONS).astype(np.float32))
        order = np.argsort(-(vectors @ asked), kind="stable")[:7]
        found = index.search(asked, 7)
        assert [s.document for s in found] == [f"d{k // EACH:02}" for k in order]
        assert [s.passage for s in found] == [f"passage {k % EACH} of {k // EACH}" for k in order]
        assert [s.score for s in found] == pytest.approx((vectors @ asked)[order], abs=1e-5)


def test_a_passage_finds_itself_and_more_than_there_is_is_all(folder: Path, vectors: np.ndarray) -> None:
    index = Index.load(folder)
    found = index.search(vectors[37], 1000)
    assert len(found) == len(vectors)
    assert (found[0].document, found[0].title, found[0].passage, found[0].label) == ("d07", "title 7", "passage 2 of 7", "label")
    assert found[0].score == pytest.approx(1.0, abs=1e-5)


def test_recommended_are_the_nearest_documents_without_the_given_ones(folder: Path, vectors: np.ndarray) -> None:
    index = Index.load(folder)
    means = unit(vectors.reshape(DOCUMENTS, EACH, DIMENSIONS).sum(1))
    liked = unit(means[[3, 4]].mean(0))
    order = [k for k in np.argsort(-(means @ liked)) if k not in (3, 4)][:5]
    found = index.recommend(["d03", "d04", "d03"], None, 5)
    both = index.recommend(["d03", "d04"], None, 5)
    assert [s.document for s in both] == [f"d{k:02}" for k in order]
    assert both[0].passage == f"passage 0 of {order[0]}"
    assert {"d03", "d04"}.isdisjoint(s.document for s in found)
    assert len(index.recommend(["d00"], None, 100)) == DOCUMENTS - 1
    assert index.recommend([], means[9], 1)[0].document == "d09"
    assert index.recommend([f"d{k:02}" for k in range(DOCUMENTS)], None, 3) == ()


def test_a_document_that_is_not_there_is_named(folder: Path) -> None:
    with pytest.raises(ClientFault, match="'d99' is not in the index"):
        Index.load(folder).recommend(["d00", "d99"], None, 3)


@pytest.mark.parametrize(("file", "content"), [(CARD, b"{}"), (CARD, None), (PASSAGES, b"x"), (VECTORS, b"x"), (VECTORS, None)])
def test_a_broken_file_is_named(folder: Path, file: str, content: bytes | None) -> None:
    if content is None:
        (folder / file).unlink()
    else:
        (folder / file).write_bytes(content)
    with pytest.raises(ClientFault, match=file) as caught:
        Index.load(folder)
    assert caught.value.code == "invalid_index"


@pytest.mark.parametrize("change", ["fewer vectors", "other numbers", "long vectors", "fewer passages"])
def test_parts_that_do_not_fit_are_refused(folder: Path, vectors: np.ndarray, change: str) -> None:
    if change == "fewer passages":
        card = json.loads((folder / CARD).read_bytes())
        (folder / CARD).write_text(json.dumps(card | {"passages": 99}))
        save_file({"vectors": vectors[:99]}, folder / VECTORS)
    else:
        changed = {"fewer vectors": vectors[1:], "other numbers": vectors.astype(np.float16), "long vectors": 2 * vectors}[change]
        save_file({"vectors": changed}, folder / VECTORS)
    with pytest.raises(ClientFault) as caught:
        Index.load(folder)
    assert caught.value.code == "invalid_index"
