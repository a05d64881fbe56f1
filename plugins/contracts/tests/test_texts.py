"""What a dataset of texts may not be, file by file; the scores are tried in plugins/trainer/tests/test_evaluation.py."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from kernelm_contracts.texts import read_dataset
from kernelm_sdk.errors import ClientFault

ROWS = {"train": [("shares fell", 0), ("a goal", 1)], "validation": [("bank", 0)], "test": [("match", 1)]}


def table(rows: list[tuple[Any, Any]], label: pa.DataType = pa.int32()) -> pa.Table:
    schema = pa.schema([("text", pa.string()), ("label", label)])
    return pa.Table.from_pylist([{"text": text, "label": label} for text, label in rows], schema)


def write_card(folder: Path, labels: list[str]) -> None:
    (folder / "dataset.json").write_text(json.dumps({"name": "d", "labels": labels, "steps": [], "splits": {}, "max_tokens": 0}))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_card(tmp_path, ["business", "sport"])
    for split, rows in ROWS.items():
        parquet.write_table(table(rows), tmp_path / f"{split}.parquet")
    return tmp_path


def test_the_splits_that_are_asked_for(folder: Path) -> None:
    dataset = read_dataset(folder)
    assert dataset.labels == ("business", "sport")
    assert (dataset.train.texts, dataset.train.labels.tolist()) == (["shares fell", "a goal"], [0, 1])
    (folder / "test.parquet").unlink()
    assert read_dataset(folder, ("train", "validation")).splits.keys() == {"train", "validation"}


BROKEN: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "no card": ("dataset.json", lambda f: (f / "dataset.json").unlink()),
    "a card that is none": ("dataset.json", lambda f: (f / "dataset.json").write_text('{"a": 1}')),
    "one label": ("dataset.json", lambda f: write_card(f, ["business"])),
    "a label twice": ("dataset.json", lambda f: write_card(f, ["business", "business"])),
    "no such split": ("test.parquet", lambda f: (f / "test.parquet").unlink()),
    "no table": ("test.parquet", lambda f: (f / "test.parquet").write_text(json.dumps(ROWS))),
    "half a table": ("test.parquet", lambda f: (f / "test.parquet").write_bytes((f / "test.parquet").read_bytes()[:-20])),
    "no column": ("test.parquet", lambda f: parquet.write_table(pa.table({"text": ["a"]}), f / "test.parquet")),
    "no documents": ("test.parquet", lambda f: parquet.write_table(table([]), f / "test.parquet")),
    "no text": ("test.parquet", lambda f: parquet.write_table(table([(None, 0)]), f / "test.parquet")),
    "no label of one": ("test.parquet", lambda f: parquet.write_table(table([("a", None)]), f / "test.parquet")),
    "labels as words": ("test.parquet", lambda f: parquet.write_table(table([("a", "sport")], pa.string()), f / "test.parquet")),
    "a label too high": ("test.parquet", lambda f: parquet.write_table(table([("a", 2)]), f / "test.parquet")),
    "a label below none": ("test.parquet", lambda f: parquet.write_table(table([("a", -1)]), f / "test.parquet")),
    "a label not to be learned": ("train.parquet", lambda f: parquet.write_table(table([("a", 0)]), f / "train.parquet")),
}  # fmt: skip


@pytest.mark.parametrize("what", BROKEN)
def test_what_is_broken_is_named(what: str, folder: Path) -> None:
    file, damage = BROKEN[what]
    damage(folder)
    with pytest.raises(ClientFault, match=file) as refused:
        read_dataset(folder)
    assert refused.value.code == "invalid_dataset"
    assert str(folder) not in refused.value.message, "the place is the system's own"
