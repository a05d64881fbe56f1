"""What there is to read: files of artifacts and URLs, cut into pieces, dealt out to shards that one worker takes each."""

import fnmatch
import io
import os
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq

from kernelm_contracts.data import Input, Store
from kernelm_data.corpus.remote import Found, Remote, listed
from kernelm_data.corpus.streams import PACKINGS, stamp_of
from kernelm_sdk.errors import ClientFault

FORMATS = ("html", "pdf", "text", "csv", "jsonl", "parquet", "warc", "zip", "tar")
BY_SUFFIX = {
    ".html": "html",
    ".htm": "html",
    ".xhtml": "html",
    ".pdf": "pdf",
    ".csv": "csv",
    ".tsv": "csv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".warc": "warc",
    ".zip": "zip",
    ".tar": "tar",
    ".tgz": "tar",
    ".tbz2": "tar",
    ".txz": "tar",
}
MAGIC = ((b"%PDF-", "pdf"), (b"PAR1", "parquet"), (b"PK\x03\x04", "zip"), (b"WARC/1", "warc"))
SHARDS, MIN_SHARD = 16, 4_000_000


class Piece(msgspec.Struct, frozen=True):
    """A file, or the part of one that a worker reads."""

    id: str  # path within its input; begins the ids of its documents
    path: str  # where it lies: a local path or URL
    format: str
    packing: str
    size: int  # bytes
    input: int  # position in the request's inputs
    start: int = 0  # jsonl: first byte; parquet: first row group
    stop: int = -1  # the one after the last; -1 for all
    skipped: str = ""  # why it is not read at all
    stamp: str = ""  # of the state it was found in, as its file system tells it; an artifact never changes


def of_name(name: str) -> tuple[str, str]:
    """Format and packing by a file's name; "" for a format that the name does not tell."""
    path = PurePosixPath(name.lower())
    packing = PACKINGS.get(path.suffix, "")
    if packing and path.suffix not in (".tgz", ".tbz2", ".txz"):
        path = path.with_suffix("")
    return BY_SUFFIX.get(path.suffix, ""), packing


def of_bytes(head: bytes) -> str:
    """Format by a file's first bytes; "text" where they tell nothing."""
    for magic, format in MAGIC:
        if head.startswith(magic):
            return format
    start = head[:1024].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    return "html" if start.startswith((b"<!doctype html", b"<html", b"<?xml")) and b"<html" in head[:4096].lower() else "text"


def local(folder: Path) -> Iterator[Found]:
    """What there is in a folder; sorted. Symbolic links out of the folder are not followed."""
    root = folder.resolve()
    if root.is_file():
        yield Found(root.name, str(root), root.stat().st_size, "", stamp_of(root.stat()))
        return
    found = []
    for where, folders, files in os.walk(root):
        links = [name for name in folders if (Path(where) / name).is_symlink()]
        for name in (*files, *links):
            path = Path(where) / name
            inside = os.fsencode(path.relative_to(root)).decode("utf-8", "backslashreplace")
            if path.is_symlink() and not path.resolve().is_relative_to(root):
                found.append(Found(inside, str(path), 0, "symbolic link out of the folder"))
            elif path.is_dir():
                found.append(Found(inside, str(path), 0, "symbolic link to a folder"))
            elif not path.is_file():  # reading a FIFO would never end
                found.append(Found(inside, str(path), 0, "not a regular file"))
            else:
                state = path.stat()
                found.append(Found(inside, str(path), state.st_size, "", stamp_of(state)))
    yield from sorted(found)


def pieces(inputs: Sequence[Input], folders: Sequence[Path | None], store: Store) -> list[Piece]:
    """Everything that is to be read, in a fixed order. `folders`: of each input that is an artifact. ClientFault if there is
    nothing."""
    found: list[Piece] = []
    for number, (given, folder) in enumerate(zip(inputs, folders, strict=True)):
        path = folder or (None if "://" in given.url else Path(given.url))
        entries = local(path) if path is not None else listed(given.url)
        if path is not None and not path.exists():
            raise ClientFault("unreadable", f"inputs[{number}].url: {given.url}: there is no such file or folder", "check the path")
        for name, where, size, skipped, stamp in entries:
            if given.include and not any(fnmatch.fnmatch(name, pattern) for pattern in given.include):
                continue
            format, packing = of_name(name)
            if given.format != "auto":
                format = given.format
            elif not format and not skipped and not packing:
                format = of_bytes(_head(where))
            stamp = "" if folder else stamp  # an artifact may be unpacked again, with other times
            found.append(Piece(name, where, format or "text", packing, size, number, skipped=skipped, stamp=stamp))
    if not any(not piece.skipped for piece in found):
        raise ClientFault(
            "empty_source", "the inputs hold no file that could be read", "check source, inputs and their include patterns"
        )
    part = shard_size(found, store)
    return [each for piece in found
            for each in (_parts(piece, part) if piece.size > 1.5 * part and not piece.packing and not piece.skipped else [piece])
            ]  # fmt: skip


def shard_size(found: Sequence[Piece], store: Store) -> int:
    """Bytes of a shard: `shard_mb`, or less so that a small input still makes SHARDS of at least MIN_SHARD bytes. It must not hang
    on the number of workers: other shards are other files."""
    total = sum(piece.size for piece in found)
    return int(min(store.shard_mb * 1e6, max(MIN_SHARD, total / SHARDS)))


def _head(path: str) -> bytes:
    try:
        with io.BufferedReader(Remote(path)) if "://" in path else open(path, "rb") as file:  # noqa: PTH123
            return bytes(file.read(4096))
    except OSError:
        return b""  # the reader says so


def _parts(piece: Piece, part: int) -> list[Piece]:
    """A large file that can be read from the middle, in parts."""
    replace = msgspec.structs.replace
    if piece.format == "jsonl":
        starts = range(0, piece.size, part)
        return [replace(piece, start=s, stop=min(s + part, piece.size), size=min(part, piece.size - s)) for s in starts]
    if piece.format == "parquet" and "://" not in piece.path:
        try:
            metadata = pq.read_metadata(piece.path)
        except (OSError, pa.ArrowException):
            return [piece]  # the reader says what is wrong
        groups = metadata.num_row_groups
        step = max(1, round(groups * part / piece.size))
        return [replace(piece, start=g, stop=min(g + step, groups), size=piece.size * (min(g + step, groups) - g) // groups)
                for g in range(0, groups, step)]  # fmt: skip
    return [piece]


def shards(found: Sequence[Piece], store: Store) -> list[list[Piece]]:
    """The pieces, dealt out in order, so that each shard has about `shard_size` bytes."""
    result: list[list[Piece]] = [[]]
    size = room = shard_size(found, store)
    for piece in found:
        if result[-1] and piece.size > room:
            result.append([])
            room = size
        result[-1].append(piece)
        room -= piece.size
    return result
