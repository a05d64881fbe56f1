"""Readers: how a source artifact becomes raw documents. A format is one function, registered under its name."""

import difflib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from kernelm_sdk.errors import ClientFault


class Raw(msgspec.Struct, frozen=True):
    """A document as it lies in the source, not decoded yet."""

    id: str
    label: str
    data: bytes = b""
    skipped: str = ""  # why it is no document of this format at all
    broken: str = ""  # why it could not be read


class Source(msgspec.Struct, frozen=True):
    """What a reader found; `documents` are read from disk one at a time, sorted by id."""

    labels: tuple[str, ...]  # sorted; also those of which no document is readable
    total: int
    documents: Iterator[Raw]


Reader = Callable[[Path], Source]
FORMATS: dict[str, Reader] = {}  # the name in `PrepareRequest.format` -> its reader


def reader(name: str) -> Callable[[Reader], Reader]:
    """Register a reader under the name of its format."""

    def register(function: Reader) -> Reader:
        if name in FORMATS:
            raise ValueError(f"format {name!r} has two readers: {FORMATS[name]!r} and {function!r}")
        FORMATS[name] = function
        return function

    return register


def find_reader(name: str) -> Reader:
    """The reader of a format; ClientFault `unknown_format` with those that there are."""
    if name not in FORMATS:
        close = difflib.get_close_matches(name, FORMATS, 1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ClientFault("unknown_format", f"format: {name!r} is not known", f"{hint}known are: {', '.join(sorted(FORMATS))}")
    return FORMATS[name]


@reader("folders")
def read_folders(folder: Path) -> Source:
    """`<class>/<document>.txt`: the folder's name is the label. Other files are passed over and counted. ClientFault if the
    folder is empty, has no class sub-folders or an empty one, or holds a symbolic link that leads out of it."""
    root = folder.resolve()
    entries = _entries(root, root)
    if not entries:
        raise ClientFault("empty_source", f"{folder.name}: the source folder is empty", "give <class>/<document>.txt files")
    classes = [e for e in entries if e.is_dir() and not e.name.startswith(".")]
    if not classes:
        raise ClientFault("no_classes", f"{folder.name}: {len(entries)} files, but no sub-folders, one a class",
                          "put the documents of each class into a folder that is named like the class")
    found = [(e, "") for e in entries if e not in classes]
    for entry in classes:
        members = [(e, _name(entry)) for e in _entries(Path(entry.path), root)]
        if not any(_is_document(e) for e, _ in members):
            raise ClientFault("empty_class", f"{_name(entry)}/: no .txt document in this class folder",
                              "add documents as <class>/<document>.txt, or remove the folder")
        found += members
    found.sort(key=lambda pair: (pair[1], _name(pair[0])))
    labels = tuple(sorted(_name(e) for e in classes))
    return Source(labels, len(found), (_raw(entry, label) for entry, label in found))


def _entries(folder: Path, root: Path) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as listing:
        entries = list(listing)
    for entry in entries:
        if entry.is_symlink() and not Path(entry.path).resolve().is_relative_to(root):
            link = Path(entry.path)
            raise ClientFault("link_outside", f"{link.relative_to(root).as_posix()}: symbolic link to {str(link.readlink())!r}, "
                                              "out of the source folder", "replace the link by the file it points to")
    return entries


def _name(entry: os.DirEntry[str]) -> str:
    # names on Linux are bytes; those that are not UTF-8 must still have one spelling, and fit into Parquet
    return os.fsencode(entry.name).decode("utf-8", "backslashreplace")


def _is_document(entry: os.DirEntry[str]) -> bool:
    return entry.name.lower().endswith(".txt") and not entry.name.startswith(".") and not entry.is_dir()


def _raw(entry: os.DirEntry[str], label: str) -> Raw:
    name = f"{label}/{_name(entry)}" if label else _name(entry)
    if not label:
        return Raw(name, label, skipped="outside a class folder")
    if entry.is_dir():
        return Raw(name, label, skipped="a folder within a class folder")
    if not _is_document(entry):
        return Raw(name, label, skipped="not a .txt file")
    try:
        if not entry.is_file():  # reading a FIFO would never end
            return Raw(name, label, broken="not a regular file")
        return Raw(name, label, Path(entry.path).read_bytes())
    except OSError as error:
        return Raw(name, label, broken=f"unreadable: {error.strerror}")
