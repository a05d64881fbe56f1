"""Recognizing pickles, by name and by content: loading one runs whatever code its author put in it.

Nothing is ever unpickled here: `pickletools.genops` only parses opcodes. Format: PEP 3154 and Lib/pickletools.py.
"""

import io
import pickletools
import zipfile
from pathlib import PurePosixPath
from typing import BinaryIO

SUFFIXES = frozenset({".pkl", ".pickle", ".pt", ".pth", ".bin", ".ckpt", ".joblib"})
COMPRESSED = frozenset({".gz", ".bz2", ".xz", ".lzma", ".z", ".zst", ".lz4"})
HEAD_BYTES = 1 << 20  # a pickle without a header is recognized when all of it is within these


def pickle_in(path: str, file: BinaryIO) -> str:
    """Why the file at `path`, open for reading, counts as a pickle; "" if it does not. Moves the file's position."""
    if reason := _by_name(path):
        return reason
    head = file.read(HEAD_BYTES)
    if reason := _by_content(head):
        return reason
    if head.startswith(b"PK\x03\x04"):
        file.seek(0)
        return _in_zip(file)
    return ""


def _by_name(path: str) -> str:
    suffixes = [s.lower() for s in PurePosixPath(path).suffixes]
    while suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    return f"its name ends in {suffixes[-1]}" if suffixes and suffixes[-1] in SUFFIXES else ""


def _by_content(head: bytes) -> str:
    if head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        # a safetensors file begins with the length of its JSON header, which may look the same
        if head[8:9] != b"{" and len(_opcodes(head, 2)) == 2:
            return f"it begins like a pickle of protocol {head[1]}"
        return ""
    if head.startswith(b"\x93NUMPY"):
        return "it is a NumPy array of pickled objects" if b"|O" in head[:256] else ""
    if b"." in head:
        names = _opcodes(head)
        if names[-1:] == ["STOP"] and not {"GLOBAL", "INST"}.isdisjoint(names):
            return "it is a pickle of protocol 0 or 1"
    return ""


def _opcodes(head: bytes, at_most: int = 10_000_000) -> list[str]:
    """Names of the opcodes that `head` begins with, up to STOP or to the first byte that is none."""
    names: list[str] = []
    try:
        for opcode, _, _ in pickletools.genops(io.BytesIO(head)):
            names.append(opcode.name)
            if len(names) == at_most:
                break
    except Exception:  # genops raises several types at what is no pickle, all of them meaning just that
        return names
    return names


def _in_zip(file: BinaryIO) -> str:
    try:
        with zipfile.ZipFile(file) as archive:
            for name in archive.namelist():
                if reason := _by_name(name):
                    return f"it is a zip file that holds {name!r}: {reason}"
                with archive.open(name) as member:
                    if reason := _by_content(member.read(4096)):
                        return f"it is a zip file that holds {name!r}: {reason}"
    except (zipfile.BadZipFile, RuntimeError, NotImplementedError):  # damaged, encrypted, unknown compression
        return "it is a zip file that can't be looked into"
    return ""
