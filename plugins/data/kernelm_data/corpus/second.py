"""The second steps, of one shard: the documents that stay are tokenized, packed and stored as Parquet, by split."""

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from kernelm_data.corpus.near import SPLITS
from kernelm_data.corpus.plan import FIRST, KEEP, Plan, load
from kernelm_data.corpus.store import Documents
from kernelm_data.corpus.tokenizing import Encoder, Packer

SECOND = "second"
ROWS = 1024  # of a row group: what is read for one document
COLUMNS = ("id", "text", "source", "label", "language")
PACKED = pa.schema([("input_ids", pa.list_(pa.int32())), ("starts", pa.list_(pa.int32()))])


class File(msgspec.Struct, frozen=True):
    """A file of the shard."""

    name: str  # "train.parquet", "packed-train.parquet"
    digest: str
    rows: int
    bytes: int


class SecondBook(msgspec.Struct):
    """Written last: a shard that has one is complete."""

    files: list[File] = []
    documents: dict[str, int] = {}  # split -> documents
    tokens: dict[str, int] = {}
    cut: int = 0
    token_lengths: list[int] = []  # of a sample
    private_left: dict[str, int] = {}
    text_bytes: int = 0
    labels: dict[str, dict[str, int]] = {}  # split -> label -> documents


@lru_cache(1)
def encoder_of(path: str, fast: bool) -> Encoder:
    """The tokenizer of this process."""
    return Encoder(Path(path), fast)


class Writer:
    """The files of one split."""

    def __init__(self, folder: Path, split: str, plan: Plan) -> None:
        self.folder, self.split, self.plan = folder, split, plan
        self.rows, self.sequences = 0, 0
        self._rows: pq.ParquetWriter | None = None
        self._packed: pq.ParquetWriter | None = None
        self._encoder = encoder_of(plan.tokenizer, plan.fast_tokens) if plan.tokenizer else None
        pack = plan.request.pack
        self._packer = Packer(pack.length, self._encoder.end(pack.separator)) if self._encoder and pack.length else None

    def _open(self, name: str, schema: pa.Schema, plain: Sequence[str]) -> pq.ParquetWriter:
        dictionary = [n for n in schema.names if n not in plain]
        return pq.ParquetWriter(self.folder / f"{name}.parquet", schema, compression="zstd", write_statistics=["id"],
                                compression_level=self.plan.request.store.zstd_level, use_dictionary=dictionary)  # fmt: skip

    def add(self, batch: pa.RecordBatch, book: SecondBook) -> None:
        """Store the documents of a batch."""
        columns = {name: batch.column(name) for name in COLUMNS}
        columns["text"] = columns["text"].cast(pa.string())
        self.rows += batch.num_rows
        book.documents[self.split] = book.documents.get(self.split, 0) + batch.num_rows
        if self._encoder is not None:
            texts = [text.as_buffer().to_pybytes() for text in batch.column("text")]
            if self._packer is not None:
                offsets, ids = self._encoder.plain(texts)
                self._pack(self._packer.add(offsets, ids))
            else:
                offsets, ids, cut = self._encoder.whole(texts, self.plan.request.tokenize.max_tokens)
                book.cut += cut
                columns["input_ids"] = pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(ids, pa.int32()))
            book.tokens[self.split] = book.tokens.get(self.split, 0) + len(ids)
            if len(book.token_lengths) < 2000:
                book.token_lengths += np.diff(offsets)[:500].tolist()
        table = pa.table(columns)
        if self._rows is None:
            self._rows = self._open(self.split, table.schema, ("id", "text", "input_ids"))
        self._rows.write_table(table, row_group_size=ROWS)

    def _pack(self, sequences: Any) -> None:
        found = list(sequences)
        if not found:
            return
        if self._packed is None:
            self._packed = self._open(f"packed-{self.split}", PACKED, PACKED.names)
        ids = pa.array([ids for ids, _ in found], PACKED.field(0).type)
        self._packed.write_table(pa.table([ids, pa.array([s for _, s in found], PACKED.field(1).type)], schema=PACKED),
                                 row_group_size=ROWS)  # fmt: skip
        self.sequences += len(found)

    def close(self) -> list[File]:
        """Finish the files."""
        if self._packer is not None and (rest := self._packer.rest()) is not None:
            self._pack([rest])
        files = []
        for writer, name, rows in ((self._rows, self.split, self.rows), (self._packed, f"packed-{self.split}", self.sequences)):
            if writer is not None:
                writer.close()
                path = self.folder / f"{name}.parquet"
                with path.open("rb") as file:
                    digest = hashlib.file_digest(file, "sha256").hexdigest()
                files.append(File(path.name, f"sha256:{digest}", rows, path.stat().st_size))
        return files


def second(path: str, number: int) -> int:
    """Store the shard `number` of the plan in the file `path`; bytes of text."""
    plan = load(path)
    source = Path(plan.work) / FIRST / f"{number:05}"
    folder = Path(plan.work) / SECOND / f"{number:05}"
    folder.mkdir(parents=True, exist_ok=True)
    assigned = np.load(Path(plan.work) / KEEP / f"{number:05}.npy")
    reported = _reported(source)
    book = SecondBook()
    writers: dict[int, Writer] = {}
    row = 0
    for batch in Documents(source / "docs.arrow").batches():
        part = assigned[row : row + batch.num_rows]
        row += batch.num_rows
        for position, split in enumerate(SPLITS):
            mask = part == position
            if not mask.any():
                continue
            chosen = batch if mask.all() else batch.filter(pa.array(mask))
            writer = writers.setdefault(position, Writer(folder, split, plan))
            writer.add(chosen, book)
            book.text_bytes += chosen.column("text").nbytes
            _count(chosen, split, reported, book)
    for _, writer in sorted(writers.items()):
        book.files += writer.close()
    temporary = folder / "book.json.part"
    temporary.write_bytes(msgspec.json.encode(book))
    temporary.replace(folder / "book.json")
    return book.text_bytes


def _reported(source: Path) -> dict[str, dict[str, int]]:
    class Part(msgspec.Struct):
        private_reported: dict[str, dict[str, int]] = {}

    return msgspec.json.decode((source / "book.json").read_bytes(), type=Part).private_reported


def _count(batch: pa.RecordBatch, split: str, reported: dict[str, dict[str, int]], book: SecondBook) -> None:
    counts = book.labels.setdefault(split, {})
    for entry in batch.column("label").value_counts().to_pylist():
        if entry["values"]:
            counts[entry["values"]] = counts.get(entry["values"], 0) + entry["counts"]
    if reported:
        for id in batch.column("id").to_pylist():
            for kind, count in reported.get(id, {}).items():
                book.private_left[kind] = book.private_left.get(kind, 0) + count
