"""Formats: from the bytes of a piece to its records. A format is one function, registered under its name.

Whatever can't be read is a record with a reason: nothing is fatal, and nothing is left out silently.
"""

import csv
import io
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import PurePosixPath
from typing import IO, Any

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq

from kernelm_contracts.data import Input, Limits
from kernelm_data.corpus.inputs import Piece, of_bytes, of_name
from kernelm_data.corpus.streams import Broken, lines, opened, read_all, unpack


class Record(msgspec.Struct):
    """A document as it lies in its file."""

    id: str
    kind: str  # "text", "html", "pdf"
    data: bytes | str
    format: str  # of the file it was in
    label: str = ""
    broken: str = ""  # why it could not be read
    detail: str = ""
    count: int = 1  # records that a broken one stands for
    skipped: bool = False  # no document at all: it doesn't count as broken


Reader = Callable[[Piece, IO[bytes], Input, Limits], Iterator[Record]]
READERS: dict[str, Reader] = {}
CSV_LINES = 1000  # that one quoted field may span


def reader(*names: str) -> Callable[[Reader], Reader]:
    """Register a reader of formats."""

    def register(function: Reader) -> Reader:
        for name in names:
            if name in READERS:
                raise ValueError(f"format {name!r} has two readers: {READERS[name]!r} and {function!r}")
            READERS[name] = function
        return function

    return register


def records(piece: Piece, given: Input, limits: Limits) -> Iterator[Record]:
    """Every record of a piece."""
    if piece.skipped:
        yield Record(piece.id, "text", b"", piece.format, broken=piece.skipped, skipped=True)
        return
    try:
        start = piece.start if piece.format == "jsonl" else 0
        with opened(piece.path, piece.packing, limits, start, piece.stamp) as stream:
            yield from READERS[piece.format](piece, stream, given, limits)
    except Broken as error:
        yield Record(piece.id, "text", b"", piece.format, broken=error.reason, detail=error.detail)
    except OSError as error:
        yield Record(piece.id, "text", b"", piece.format, broken="unreadable", detail=str(error))


def _broken(piece: Piece, where: object, error: Broken) -> Record:
    return Record(f"{piece.id}#{where}", "text", b"", piece.format, broken=error.reason, detail=error.detail)


@reader("text", "html", "pdf")
def read_whole(piece: Piece, stream: IO[bytes], given: Input, limits: Limits) -> Iterator[Record]:
    """One document a file."""
    data = read_all(stream, limits)
    kind = piece.format
    if kind == "text" and given.format == "auto" and piece.packing and not of_name(piece.id)[0]:
        kind = of_bytes(data)  # only now unpacked
        kind = kind if kind in ("html", "pdf") else "text"
    yield Record(piece.id, kind, data, kind)


def _field(row: dict[str, Any], name: str, what: str) -> str:
    if name not in row:
        raise Broken(f"no {what} {name!r}", f"there are {', '.join(map(str, row))[:200]}")
    value = row[name]
    if not isinstance(value, str):
        raise Broken(f"{what} {name!r} is no string", type(value).__name__)
    return value


def _record(piece: Piece, number: int, row: dict[str, Any], given: Input, what: str) -> Record:
    text = _field(row, given.text, what)
    id = str(row[given.id]) if given.id and row.get(given.id) is not None else f"{piece.id}#{number}"
    label = str(row.get(given.label, "")) if given.label else ""
    return Record(id, "text", text, piece.format, label)


@reader("jsonl")
def read_jsonl(piece: Piece, stream: IO[bytes], given: Input, limits: Limits) -> Iterator[Record]:
    """An object a line. The part of a file that begins in the middle of a line leaves it to the part before."""
    at = piece.start
    if piece.start:
        stream.seek(piece.start - 1)
        at -= 1
        while (line := stream.readline(1 << 20)) and not line.endswith(b"\n"):
            at += len(line)
        at += len(line)
    decoder = msgspec.json.Decoder(dict[str, Any])
    counted = _Counting(stream, at)
    for line in lines(counted, limits):  # type: ignore[arg-type]
        try:
            if isinstance(line, Broken):
                raise line
            if line.strip():
                yield _record(piece, counted.line, decoder.decode(line), given, "key")
        except msgspec.DecodeError as error:
            yield _broken(piece, counted.line, Broken("invalid JSON", str(error)))
        except UnicodeDecodeError as error:
            yield _broken(piece, counted.line, Broken("broken utf-8", f"byte {error.start} of a string"))
        except Broken as error:
            yield _broken(piece, counted.line, error)
        if piece.stop >= 0 and counted.at >= piece.stop:
            return


class _Counting:
    """A stream that knows where it is; a line is named by the byte it begins at, which does not hang on where a part begins."""

    def __init__(self, stream: IO[bytes], at: int) -> None:
        self._stream, self.at, self.line = stream, at, at
        self._whole = True

    def readline(self, most: int) -> bytes:
        data = self._stream.readline(most)
        if self._whole:
            self.line = self.at
        self._whole = data.endswith(b"\n")
        self.at += len(data)
        return data


@reader("csv")
def read_csv(piece: Piece, stream: IO[bytes], given: Input, limits: Limits) -> Iterator[Record]:
    """A header and a row a record (RFC 4180), each record put together by the parity of its quotes, so that a quote that is
    never closed costs its own line and no other."""
    csv.field_size_limit(int(limits.document_mb * 1e6) + 1)
    delimiter = "\t" if piece.id.lower().removesuffix("." + piece.packing).endswith(".tsv") else given.delimiter
    source = lines(stream, limits)
    header: list[str] = []
    number = 0
    held: list[bytes] = []  # lines that were read and have to be read again
    while True:
        item = held.pop(0) if held else next(source, None)
        if item is None:
            return
        number += 1
        if isinstance(item, Broken):
            yield _broken(piece, number, item)
            continue
        if not header:
            item = item.removeprefix(b"\xef\xbb\xbf")
        first, joined, more = number, item, [item]
        while joined.count(b'"') % 2 and len(more) < CSV_LINES:
            following = held.pop(0) if held else next(source, None)
            if following is None or isinstance(following, Broken):
                break
            more.append(following)
            joined += b"\n" + following
        try:
            if joined.count(b'"') % 2:
                raise Broken("unclosed quote")
            row = _row(joined, delimiter)
            if not header:
                header = row
            elif len(row) != len(header):
                raise Broken("wrong number of columns", f"{len(row)}, not {len(header)}")
            else:
                yield _record(piece, first, dict(zip(header, row, strict=True)), given, "column")
            number += len(more) - 1
        except Broken as error:
            why = error
            if len(more) > 1:  # the quote may have been closed by one that opens a field of the next record
                why = Broken("unclosed quote", "the line is left out, the next ones are read")
                held = more[1:] + held
            yield _broken(piece, first, why)


def _row(line: bytes, delimiter: str) -> list[str]:
    try:
        row = next(csv.reader(io.StringIO(line.decode("utf-8"), newline=""), delimiter=delimiter, strict=True), [])
    except UnicodeDecodeError as error:
        raise Broken("broken utf-8", f"byte {error.start}") from None
    except csv.Error as error:
        raise Broken("broken quoting", str(error)) from None
    return row


@reader("parquet")
def read_parquet(piece: Piece, stream: IO[bytes], given: Input, limits: Limits) -> Iterator[Record]:
    """Rows, a batch at a time. A file without the text column is one record that stands for all its rows."""
    try:
        file = pq.ParquetFile(stream)
        groups = range(piece.start, piece.stop if piece.stop >= 0 else file.metadata.num_row_groups)
        rows = sum(file.metadata.row_group(g).num_rows for g in groups)
        schema = file.schema_arrow
        if given.text not in schema.names:
            detail = f"there are {', '.join(schema.names)[:200]}"
            yield Record(piece.id, "text", b"", "parquet", broken=f"no column {given.text!r}", detail=detail, count=max(rows, 1))
            return
        kind = schema.field(given.text).type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_dictionary(kind)):
            yield Record(piece.id, "text", b"", "parquet", broken=f"column {given.text!r} is no string", detail=str(kind),
                         count=max(rows, 1))  # fmt: skip
            return
        columns = list(dict.fromkeys(c for c in (given.text, given.id, given.label) if c and c in schema.names))
        number = sum(file.metadata.row_group(g).num_rows for g in range(piece.start))
        for batch in file.iter_batches(256, row_groups=list(groups), columns=columns):
            for row in batch.to_pylist():
                try:
                    yield _record(piece, number, row, given, "column")
                except Broken as error:
                    yield _broken(piece, number, error)
                number += 1
    except (pa.ArrowException, OSError) as error:
        raise Broken("broken parquet", str(error).splitlines()[0][:200]) from None


@reader("warc")
def read_warc(piece: Piece, stream: IO[bytes], given: Input, limits: Limits) -> Iterator[Record]:
    """The responses of a web archive (ISO 28500): HTML, PDF and plain text; others are passed over and counted."""
    from fastwarc.warc import ArchiveIterator, WarcRecordType

    most = int(limits.document_mb * 1e6)
    kinds = {"text/html": "html", "application/xhtml+xml": "html", "application/pdf": "pdf", "text/plain": "text"}
    number = 0
    try:
        for record in ArchiveIterator(stream, record_types=WarcRecordType.response | WarcRecordType.conversion):
            number += 1
            id = record.record_id or f"{piece.id}#{number}"
            content = (record.http_content_type or "text/plain").split(";")[0].strip().lower()
            if content not in kinds:
                yield Record(id, "text", b"", "warc", broken="a content type that is no text", detail=content, skipped=True)
                continue
            data = record.reader.read(most + 1)
            if len(data) > most:
                yield Record(id, "text", b"", "warc", broken="larger than limits.document_mb", detail=f"more than {most:,} bytes")
                continue
            yield Record(id, kinds[content], data, "warc", record.headers.get("WARC-Target-URI") or "" if given.label else "")
    except (OSError, ValueError) as error:
        if isinstance(error, Broken):
            raise
        raise Broken("broken WARC", f"after record {number}: {error}") from None


def _member(piece: Piece, name: str, size: int, stream: IO[bytes], given: Input, limits: Limits) -> Iterator[Record]:
    """A file within an archive, by its own format."""
    format, packing = of_name(name)
    inner = Piece(f"{piece.id}/{name}", piece.path, format or "text", packing, size, piece.input)
    if format in ("zip", "tar", "warc", "parquet") or PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
        reason = "an archive within an archive" if format else "a path out of the archive"
        yield Record(inner.id, "text", b"", piece.format, broken=reason)
        return
    try:
        for record in READERS[inner.format](inner, unpack(stream, packing, limits), given, limits):
            record.format = piece.format
            yield record
    except Broken as error:
        yield Record(inner.id, "text", b"", piece.format, broken=error.reason, detail=error.detail)


class _Counter(io.RawIOBase):
    """A member of an archive that is known to take `packed` bytes there."""

    def __init__(self, stream: IO[bytes], packed: int, limits: Limits) -> None:
        self._stream, self._most, self._total = stream, max(16_000_000, int(limits.expansion * max(packed, 1))), 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._stream.read(len(buffer))
        self._total += len(data)
        if self._total > self._most:
            raise Broken("unpacks to more than limits.expansion", f"more than {self._most:,} bytes")
        buffer[: len(data)] = data
        return len(data)


@reader("zip")
def read_zip(piece: Piece, stream: IO[bytes], given: Input, limits: Limits) -> Iterator[Record]:
    """The files of a zip archive; nothing is written to disk."""
    try:
        with zipfile.ZipFile(stream) as archive:
            for info in sorted(archive.infolist(), key=lambda info: info.filename):
                if info.is_dir():
                    continue
                try:
                    with archive.open(info) as member:
                        counted = io.BufferedReader(_Counter(member, info.compress_size, limits), 1 << 16)
                        yield from _member(piece, info.filename, info.file_size, counted, given, limits)
                except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError) as error:
                    yield Record(f"{piece.id}/{info.filename}", "text", b"", "zip", broken="broken zip member", detail=str(error))
    except (zipfile.BadZipFile, EOFError) as error:
        raise Broken("broken zip", str(error)) from None


@reader("tar")
def read_tar(piece: Piece, stream: IO[bytes], given: Input, limits: Limits) -> Iterator[Record]:
    """The files of a tar archive, in its order; links in it are not followed."""
    try:
        with tarfile.open(fileobj=stream, mode="r|") as archive:
            for info in archive:
                if info.isdir():
                    continue
                member = archive.extractfile(info) if info.isfile() else None
                if member is None:
                    yield Record(f"{piece.id}/{info.name}", "text", b"", "tar", broken="a link or device", skipped=True)
                    continue
                yield from _member(piece, info.name, info.size, member, given, limits)
    except tarfile.TarError as error:
        raise Broken("broken tar", str(error)) from None
