"""What there is to read: files of artifacts and URLs, cut into pieces, dealt out to shards that one worker takes each."""

import fnmatch
import os
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

import fsspec
import msgspec
import pyarrow as pa
import pyarrow.parquet as pq

from kernelm_contracts.data import Input, Store
from kernelm_data.corpus.streams import PACKINGS
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


def local(folder: Path) -> Iterator[tuple[str, Path, int, str]]:
    """Path within, path, bytes, and why it is not read, of each file; sorted. Symbolic links out of the folder are not followed."""
    root = folder.resolve()
    if root.is_file():
        yield root.name, root, root.stat().st_size, ""
        return
    found = []
    for where, folders, files in os.walk(root):
        links = [name for name in folders if (Path(where) / name).is_symlink()]
        for name in (*files, *links):
            path = Path(where) / name
            inside = os.fsencode(path.relative_to(root)).decode("utf-8", "backslashreplace")
            if path.is_symlink() and not path.resolve().is_relative_to(root):
                found.append((inside, path, 0, "symbolic link out of the folder"))
            elif path.is_dir():
                found.append((inside, path, 0, "symbolic link to a folder"))
            elif not path.is_file():  # reading a FIFO would never end
                found.append((inside, path, 0, "not a regular file"))
            else:
                found.append((inside, path, path.stat().st_size, ""))
    yield from sorted(found, key=lambda entry: entry[0])


def remote(url: str) -> Iterator[tuple[str, str, int, str]]:
    """The same of a URL."""
    try:
        fs, root = fsspec.core.url_to_fs(url)
        found = fs.find(root, detail=True)
    except (OSError, ValueError, ImportError) as error:
        raise ClientFault("unreadable", f"inputs: {url}: {error}", "check the address, and what fsspec needs for it") from None
    if not found:
        raise ClientFault("empty_source", f"inputs: {url}: no files", "check the address")
    for path, entry in sorted(found.items()):
        name = PurePosixPath(path).name if path == root else path.removeprefix(root).lstrip("/")
        yield name, fs.unstrip_protocol(path), int(entry.get("size") or 0), ""


def pieces(inputs: Sequence[Input], folders: Sequence[Path | None], store: Store) -> list[Piece]:
    """Everything that is to be read, in a fixed order. `folders`: of each input that is an artifact. ClientFault if there is
    nothing."""
    result: list[Piece] = []
    part = int(store.shard_mb * 1e6)
    for number, (given, folder) in enumerate(zip(inputs, folders, strict=True)):
        path = folder or (None if "://" in given.url else Path(given.url))
        entries = local(path) if path is not None else remote(given.url)
        if path is not None and not path.exists():
            raise ClientFault("unreadable", f"inputs[{number}].url: {given.url}: there is no such file or folder", "check the path")
        for name, where, size, skipped in entries:
            if given.include and not any(fnmatch.fnmatch(name, pattern) for pattern in given.include):
                continue
            format, packing = of_name(name)
            if given.format != "auto":
                format = given.format
            elif not format and not skipped and not packing:
                format = of_bytes(_head(str(where)))
            piece = Piece(name, str(where), format or "text", packing, size, number, skipped=skipped)
            result += _parts(piece, part) if size > 1.5 * part and not packing and not skipped else [piece]
    if not any(not piece.skipped for piece in result):
        raise ClientFault(
            "empty_source", "the inputs hold no file that could be read", "check source, inputs and their include patterns"
        )
    return result


def _head(path: str) -> bytes:
    try:
        with fsspec.open(path, "rb") if "://" in path else open(path, "rb") as file:  # noqa: PTH123
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
    """The pieces, dealt out in order, so that each shard has about `shard_mb` MB."""
    result: list[list[Piece]] = [[]]
    room = store.shard_mb * 1e6
    for piece in found:
        if result[-1] and piece.size > room:
            result.append([])
            room = store.shard_mb * 1e6
        result[-1].append(piece)
        room -= piece.size
    return result
