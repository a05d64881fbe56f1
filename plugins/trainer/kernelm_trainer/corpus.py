"""Reading a dataset of `data/1`, and refusing what cannot be trained on."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from kernelm_contracts.data import DatasetCard
from kernelm_contracts.trainer import TrainRequest
from kernelm_sdk.errors import ClientFault, invalid

REMEDY = "prepare the dataset again with data/1"
LINES = ("causal-lm", "seq2seq-lm", "token-classification", "sentence-embedding")  # read <split>.jsonl
COLUMNS = {"id": pa.types.is_string, "text": pa.types.is_string, "label": pa.types.is_integer,
           "input_ids": pa.types.is_list}  # fmt: skip


@dataclass(frozen=True)
class Documents:
    """The documents of one split."""

    split: str
    texts: list[str]
    labels: NDArray[np.int64]  # [documents], index into `Corpus.labels`; of "multi-label" [documents, labels], 0 or 1
    input_ids: list[NDArray[np.int64]]  # a row a document, [CLS] and [SEP] included; empty if not tokenized

    @property
    def tokens(self) -> int:
        return sum(map(len, self.input_ids))


@dataclass(frozen=True)
class Corpus:
    card: DatasetCard
    folder: Path
    splits: dict[str, Documents]

    @property
    def labels(self) -> tuple[str, ...]:
        return self.card.labels


def read_corpus(folder: Path, tokenized: bool, splits: Sequence[str], many: bool = False) -> Corpus:
    """The named `splits` of the dataset in `folder`, with token ids if `tokenized`; with any number of labels a document if `many`.

    ClientFault "invalid_dataset" that names the file and the field for missing files or columns, labels that do not
    match, a single class, an empty split, a label without training documents, or (if `tokenized`) no token ids.
    """
    card = _read_card(folder)
    if tokenized and not (folder / "tokenizer.json").is_file():
        raise _refuse(folder / "tokenizer.json", "is missing: the dataset is not tokenized",
                      "prepare it with `tokenize.tokenizer` set to the encoder's tokenizer")  # fmt: skip
    corpus = Corpus(card, folder, {split: _read_split(folder, split, card, tokenized, many) for split in splits})
    found = corpus.splits["train"].labels
    absent = set(range(len(card.labels))) - set((found.any(0).nonzero()[0] if many else found).tolist())
    if absent:
        names = ", ".join(card.labels[i] for i in sorted(absent))
        raise _refuse(folder / "train.parquet", f"column label: no document of {names}")
    return corpus


def read_card(folder: Path, request: TrainRequest) -> DatasetCard | None:
    """The dataset's card, unchecked; None for a folder of lines (`trainer/1`), which needs none."""
    path = folder / "dataset.json"
    if not path.is_file() and request.structure in LINES:
        return None
    return _decode_card(path)


def _decode_card(path: Path) -> DatasetCard:
    if not path.is_file():
        raise _refuse(path, "is missing", "give the digest of an artifact of kind dataset")
    try:
        return msgspec.json.decode(path.read_bytes(), type=DatasetCard)
    except msgspec.DecodeError as error:
        raise invalid(str(path), error, REMEDY) from None


def _read_card(folder: Path) -> DatasetCard:
    path = folder / "dataset.json"
    card = _decode_card(path)
    if len(set(card.labels)) != len(card.labels):
        raise _refuse(path, "field labels: a label occurs twice")
    if len(card.labels) < 2:
        raise _refuse(path, f"field labels: {len(card.labels)} class, a classifier needs two", "add documents of another class")
    labels = folder / "labels.json"
    if not labels.is_file():
        raise _refuse(labels, "is missing")
    try:
        names = msgspec.json.decode(labels.read_bytes(), type=tuple[str, ...])
    except msgspec.DecodeError as error:
        raise invalid(str(labels), error, REMEDY) from None
    if names != card.labels:
        raise _refuse(labels, f"differs from field labels of dataset.json: {', '.join(card.labels)}")
    return card


def _read_split(folder: Path, split: str, card: DatasetCard, tokenized: bool, many: bool) -> Documents:
    path = folder / f"{split}.parquet"
    if not path.is_file():
        raise _refuse(path, "is missing")
    types = {name: kind for name, kind in COLUMNS.items() if not (many and name == "label")}
    types |= {"labels": pa.types.is_list} if many else {}
    wanted = [name for name in types if tokenized or name != "input_ids"]
    try:
        schema = pq.read_schema(path)
        if missing := [n for n in wanted if n not in schema.names or not types[n](schema.field(n).type)]:
            raise _refuse(path, f"column {missing[0]} is missing or of another type than data/1 says")
        table = pq.read_table(path, columns=wanted)
    except (pa.ArrowException, OSError) as error:
        raise invalid(str(path), error, REMEDY) from None
    if not table.num_rows:
        raise _refuse(path, "has no documents", "give the split a larger share")
    labels = _many(path, table["labels"], len(card.labels)) if many else _one(path, table["label"], len(card.labels))
    ids = [np.asarray(row, np.int64) for row in table["input_ids"].to_pylist()] if tokenized else []
    if tokenized and (min(map(len, ids)) == 0 or max(map(len, ids)) > card.max_tokens):
        raise _refuse(path, f"column input_ids: every document must have 1 to {card.max_tokens} tokens")
    return Documents(split, table["text"].to_pylist(), labels, ids)


def _one(path: Path, column: pa.ChunkedArray, count: int) -> NDArray[np.int64]:
    if column.null_count:
        raise _refuse(path, f"column label: {column.null_count} documents have none", "label all documents, or leave those out")
    labels = column.to_numpy().astype(np.int64)
    if labels.min() < 0 or labels.max() >= count:
        raise _refuse(path, f"column label: {labels.min()} to {labels.max()}, but there are {count} labels")
    return labels


def _many(path: Path, column: pa.ChunkedArray, count: int) -> NDArray[np.int64]:
    if column.null_count:
        raise _refuse(path, f"column labels: {column.null_count} documents have none", "an empty list is none of the labels")
    hot = np.zeros((len(column), count), np.int64)
    for row, found in enumerate(column.to_pylist()):
        if not all(isinstance(k, int) and 0 <= k < count for k in found):
            raise _refuse(path, f"column labels: row {row} has {found}, but there are {count} labels")
        hot[row, found] = 1
    return hot


def _refuse(path: Path, what: str, remedy: str = REMEDY) -> ClientFault:
    return ClientFault("invalid_dataset", f"dataset: {path.name} {what}", remedy)
