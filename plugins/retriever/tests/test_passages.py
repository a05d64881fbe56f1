"""Documents become passages: where they are cut, and what is read of a dataset."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kernelm_retriever.passages import Passage, cut, read
from kernelm_sdk.errors import ClientFault

CARD = {"name": "d", "labels": ["a", "b"], "steps": [], "splits": {"train": {"documents": 1, "tokens": 0}}, "max_tokens": 0}


def words(count: int, end: str = ".") -> str:
    return " ".join(["word"] * (count - 1) + ["last" + end])


def test_paragraphs_stay_whole_as_far_as_they_fit() -> None:
    text = f"Title\n\n{words(6)}\n\n{words(3)}\n\n{words(8)}"
    assert [len(p.passage.split()) for p in cut("d", text, "a", 10)] == [9, 8]


def test_a_long_paragraph_is_cut_at_sentences_and_a_long_sentence_at_words() -> None:
    text = f"Title\n{words(6)} And {words(5)} Then {words(25)}"
    found = [p.passage for p in cut("d", text, "", 12)]
    assert [len(p.split()) for p in found] == [12, 12, 12, 2]
    assert " ".join(found) == text.split("\n")[1]


def test_nothing_is_lost_and_the_title_is_the_first_line() -> None:
    text = f"A headline\n\n{words(30)}\n{words(4)} \n\n {words(50)}"
    found = list(cut("d", text, "a", 20))
    assert {p.title for p in found} == {"A headline"}
    assert " ".join(p.passage for p in found).split() == text.split()[2:]


def test_a_text_of_one_line_is_its_own_title_and_passage() -> None:
    assert list(cut("d", "  Only this. ", "", 10)) == [Passage("d", "Only this.", "Only this.", "")]
    long = words(60)
    (found,) = cut("d", long, "", 100)
    assert found.passage == long
    assert found.title.endswith(" …")
    assert len(found.title) < 125


def write(folder: Path, path: str, label: object, kind: pa.DataType, ids: tuple[str, ...] = ("x",)) -> None:
    (folder / path).parent.mkdir(parents=True, exist_ok=True)
    columns = {"id": list(ids), "text": [f"Title of {i}\nText." for i in ids], "label": pa.array([label] * len(ids), kind)}
    pq.write_table(pa.table(columns), folder / path)


def test_datasets_and_corpora_are_read_by_id(tmp_path: Path) -> None:
    (tmp_path / "dataset.json").write_text(json.dumps(CARD))
    write(tmp_path, "train.parquet", 1, pa.int32(), ("z", "a"))
    assert [(p.document, p.label) for p in read(tmp_path, 50)] == [("a", "b"), ("z", "b")]
    corpus = tmp_path / "corpus"
    write(corpus, "train/00000.parquet", None, pa.string())
    write(corpus, "train/00001.parquet", "news", pa.string(), ("w",))
    write(corpus, "packed/train/00000.parquet", "not a document", pa.string())
    (corpus / "dataset.json").write_text(json.dumps(CARD))
    assert [(p.document, p.label) for p in read(corpus, 50)] == [("w", "news"), ("x", "")]


@pytest.mark.parametrize("broken", ["no card", "no files", "no column", "no Parquet"])
def test_what_is_no_dataset_is_refused(broken: str, tmp_path: Path) -> None:
    if broken != "no card":
        (tmp_path / "dataset.json").write_text(json.dumps(CARD))
    if broken == "no column":
        pq.write_table(pa.table({"id": ["x"]}), tmp_path / "train.parquet")
    if broken == "no Parquet":
        (tmp_path / "train.parquet").write_bytes(b"PAR1 or not")
    with pytest.raises(ClientFault) as caught:
        read(tmp_path, 50)
    assert caught.value.code == "invalid_dataset"
