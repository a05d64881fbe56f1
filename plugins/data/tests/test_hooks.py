"""Filters of third parties: what they drop is in the account, and a broken one drops nothing."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from kernelm.testing.hooks import install
from kernelm_data.account import Document
from kernelm_data.hooks import GROUP, filtered

DOCUMENTS = [Document(f"a/{i}.txt", "a", text) for i, text in enumerate(("one", "TWO", "three", "FOUR"))]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def test_without_filters_nothing_changes() -> None:
    assert filtered(DOCUMENTS) == (DOCUMENTS, [], [])


def test_what_filters_drop_is_counted_for_each(place: Path) -> None:
    install(place, GROUP, "data-shouting", "@hookimpl\ndef reason_against(text): return 'shouts' if text.isupper() else None\n")
    install(place, GROUP, "data-t", "@hookimpl\ndef reason_against(text, label): return 'has a t' if 't' in text.lower() else ''\n")
    documents, steps, dropped = filtered(DOCUMENTS)
    assert [d.text for d in documents] == ["one"]
    assert [(s.name, s.documents_in, s.documents_out, s.reasons) for s in steps] == [
        ("filter data-shouting", 4, 2, {"shouts": 2}), ("filter data-t", 2, 1, {"has a t": 1})]  # fmt: skip
    assert [(d.id, d.step) for d in dropped] == [("a/1.txt", "filter data-shouting"), ("a/3.txt", "filter data-shouting"),
                                                 ("a/2.txt", "filter data-t")]  # fmt: skip


@pytest.mark.parametrize(("name", "code", "why"), [
    ("answers", "@hookimpl\ndef reason_against(text): return 'x' if text == 'one' else 1 / (text != 'FOUR')\n",
     "reason_against answered 1.0, and neither a text nor None"),
    ("raises", "@hookimpl\ndef reason_against(text): return 'x' if 1 / (text != 'FOUR') else ''\n",
     "reason_against raised ZeroDivisionError: division by zero"),
    ("absent", "import nothing_of_that_name", "ModuleNotFoundError: No module named 'nothing_of_that_name'"),
])  # fmt: skip
def test_a_broken_filter_drops_nothing_and_stands_in_the_card(place: Path, name: str, code: str, why: str) -> None:
    install(place, GROUP, f"data-{name}", code)
    install(place, GROUP, f"data-{name}-good", "@hookimpl\ndef reason_against(text): return text == 'TWO' and 'two' or None\n")
    documents, steps, dropped = filtered(DOCUMENTS)
    assert [d.text for d in documents] == ["one", "three", "FOUR"], "not even what it had said before it raised"
    assert steps[0].changed == {f"left out: {why}": 0}
    assert (steps[1].reasons, len(dropped)) == ({"two": 1}, 1)


def test_a_filter_is_part_of_the_pipeline(place: Path, source: Path, run) -> None:
    install(place, GROUP, "data-even", "@hookimpl\ndef reason_against(text): return 'odd length' if len(text) % 2 else None\n")
    card, folder = run(source)
    step = next(s for s in card.steps if s.name == "filter data-even")
    assert 0 < step.reasons["odd length"] < 30
    texts = [text for split in card.splits for text in pq.read_table(folder / f"{split}.parquet")["text"].to_pylist()]
    assert texts
    assert not [t for t in texts if len(t) % 2]
    assert sum(s.documents for s in card.splits.values()) == len(texts)
    assert "odd length" in (folder / "dropped.jsonl").read_text()
