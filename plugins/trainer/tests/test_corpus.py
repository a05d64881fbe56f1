import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer

from kernelm_sdk.errors import ClientFault
from kernelm_trainer.corpus import read_corpus

SPLITS = ("train", "validation", "test")


def test_a_dataset_is_read_whole(news: Path) -> None:
    corpus = read_corpus(news, True, SPLITS)
    assert corpus.labels == ("business", "entertainment", "politics", "sports", "tech")
    assert [len(corpus.splits[s].labels) for s in SPLITS] == [105, 15, 30]
    train = corpus.splits["train"]
    assert train.tokens == corpus.card.splits["train"].tokens
    first_pieces = {Tokenizer.from_file(str(news / "tokenizer.json")).id_to_token(int(row[0])) for row in train.input_ids}
    assert first_pieces == {"[CLS]"}


def _change_card(**fields: object):
    def change(folder: Path) -> None:
        path = folder / "dataset.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return change


def _change_table(split: str, change_table):
    def change(folder: Path) -> None:
        path = folder / f"{split}.parquet"
        pq.write_table(change_table(pq.read_table(path)), path)
    return change


def _with_labels(table: pa.Table, value: int) -> pa.Table:
    return table.set_column(2, "label", pa.array([value] * table.num_rows, pa.int32()))


@pytest.mark.parametrize(("damage", "named"), [
    (lambda f: (f / "dataset.json").unlink(), ["dataset.json", "missing"]),
    (lambda f: (f / "test.parquet").unlink(), ["test.parquet", "missing"]),
    (lambda f: (f / "labels.json").unlink(), ["labels.json", "missing"]),
    (lambda f: (f / "tokenizer.json").unlink(), ["tokenizer.json", "not tokenized"]),
    (lambda f: (f / "dataset.json").write_text("{"), ["dataset.json"]),
    (lambda f: (f / "labels.json").write_text('{"a": 0}'), ["labels.json"]),
    (lambda f: (f / "labels.json").write_text('["a", "b"]'), ["labels.json", "differs"]),
    (lambda f: (f / "train.parquet").write_bytes(b"PAR1 not really"), ["train.parquet"]),
    (_change_card(labels=["news"]), ["dataset.json", "labels", "1 class"]),
    (_change_card(labels=["a", "a"]), ["labels", "twice"]),
    (_change_card(max_tokens=8), ["input_ids", "8"]),
    (_change_table("validation", lambda t: t.slice(0, 0)), ["validation.parquet", "no documents"]),
    (_change_table("test", lambda t: _with_labels(t, 5)), ["test.parquet", "label", "5 labels"]),
    (_change_table("train", lambda t: _with_labels(t, 0)), ["train.parquet", "entertainment", "tech"]),
    (_change_table("train", lambda t: t.drop_columns("input_ids")), ["train.parquet", "input_ids"]),
])  # fmt: skip
def test_bad_datasets_are_refused_and_the_file_named(news: Path, copy, damage, named: list[str]) -> None:
    folder = copy(news)
    damage(folder)
    with pytest.raises(ClientFault) as caught:
        read_corpus(folder, True, SPLITS)
    assert caught.value.code in {"invalid", "invalid_dataset"}
    assert all(name in caught.value.message for name in named), caught.value.message
    assert caught.value.remedy


def test_texts_alone_do_for_a_model_without_tokens(news: Path, copy) -> None:
    folder = copy(news)
    (folder / "tokenizer.json").unlink()
    _change_table("train", lambda t: t.drop_columns("input_ids"))(folder)
    assert read_corpus(folder, False, ("train",)).splits["train"].input_ids == []
