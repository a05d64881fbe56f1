"""The second steps, of one shard: the documents that stay are tokenized, packed and stored as Parquet, by split."""

import hashlib
from collections.abc import Iterable, Iterator
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from kernelm_data.corpus.arrays import bits, lists
from kernelm_data.corpus.near import SPLITS
from kernelm_data.corpus.plan import FIRST, KEEP, Plan, load
from kernelm_data.corpus.store import Documents
from kernelm_data.corpus.tokenizing import Encoder, Facts, Ids, Packer, Room, Sequences

SECOND = "second"
ROWS = 1024  # of a row group: what is read for one document
COLUMNS = ("id", "text", "source", "label", "language")
DICTIONARY = ("source", "label", "language")  # columns with few values
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
def encoder_of(facts: Facts, modified: int) -> Encoder:
    """The tokenizer of this process; `modified`: of its file, in nanoseconds."""
    return Encoder(facts)


@lru_cache(1)
def room() -> Room:
    """Where this process packs ids: those of one batch, which is written before the next one."""
    return Room()


def texts_of(column: pa.Array) -> list[bytes]:
    """The texts of a column, each copied once."""
    offsets = np.frombuffer(column.buffers()[1], np.int64, len(column) + 1, column.offset * 8).tolist()
    data = memoryview(column.buffers()[2] or b"")
    return [bytes(data[low:high]) for low, high in pairwise(offsets)]


class Writer:
    """The files of one split."""

    def __init__(self, folder: Path, split: str, plan: Plan) -> None:
        self.folder, self.split, self.plan = folder, split, plan
        self.rows, self.sequences = 0, 0
        self._rows: pq.ParquetWriter | None = None
        self._packed: pq.ParquetWriter | None = None
        facts, length = plan.tokens, plan.request.pack.length
        self._encoder = encoder_of(facts, Path(facts.path).stat().st_mtime_ns) if facts else None
        self._packer = Packer(length, plan.separator, room()) if facts and length else None

    def _open(self, name: str, schema: pa.Schema) -> pq.ParquetWriter:
        dictionary = [n for n in schema.names if n in DICTIONARY]
        # ids take two of their four bytes at most: split, the others are zeros end to end. A quarter less time than plain
        encodings = {f"{n}.list.element": "BYTE_STREAM_SPLIT" for n in schema.names if n == "input_ids"}
        return pq.ParquetWriter(self.folder / f"{name}.parquet", schema, compression="zstd", write_statistics=["id"],
                                compression_level=self.plan.request.store.zstd_level, use_dictionary=dictionary,
                                column_encoding=encodings or None)  # fmt: skip

    def add(self, batch: pa.RecordBatch, book: SecondBook) -> None:
        """Store the documents of a batch."""
        columns = {name: batch.column(name) for name in COLUMNS}
        texts, columns["text"] = columns["text"], columns["text"].cast(pa.string())
        self.rows += batch.num_rows
        book.documents[self.split] = book.documents.get(self.split, 0) + batch.num_rows
        if self._encoder is not None:
            if self._packer is not None:
                sizes = list[int]()
                self._pack(self._packer.add(_measured(self._encoder.each(texts_of(texts)), sizes)))
            else:
                offsets, ids, cut = self._encoder.whole(texts_of(texts), self.plan.request.tokenize.max_tokens)
                book.cut += cut
                columns["input_ids"], sizes = lists(offsets, ids), np.diff(offsets).tolist()
            book.tokens[self.split] = book.tokens.get(self.split, 0) + sum(sizes)
            if len(book.token_lengths) < 2000:
                book.token_lengths += sizes[:500]
        table = pa.table(columns)
        if self._rows is None:
            self._rows = self._open(self.split, table.schema)
        self._rows.write_table(table, row_group_size=ROWS)

    def _pack(self, found: Sequences) -> None:
        count = len(found.id_offsets) - 1
        if not count:
            return
        if self._packed is None:
            self._packed = self._open(f"packed-{self.split}", PACKED)
        columns = [lists(found.id_offsets, found.ids), lists(found.start_offsets, found.starts)]
        self._packed.write_table(pa.Table.from_arrays(columns, schema=PACKED), row_group_size=ROWS)
        self.sequences += count

    def close(self) -> list[File]:
        """Finish the files."""
        if self._packer is not None:
            self._pack(self._packer.rest())
        files = []
        for writer, name, rows in ((self._rows, self.split, self.rows), (self._packed, f"packed-{self.split}", self.sequences)):
            if writer is not None:
                writer.close()
                path = self.folder / f"{name}.parquet"
                with path.open("rb") as file:
                    digest = hashlib.file_digest(file, "sha256").hexdigest()
                files.append(File(path.name, f"sha256:{digest}", rows, path.stat().st_size))
        return files


def _measured(documents: Iterable[Ids], sizes: list[int]) -> Iterator[Ids]:
    for ids in documents:
        sizes.append(len(ids))
        yield ids


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
            chosen = batch if mask.all() else batch.filter(bits(mask))
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
