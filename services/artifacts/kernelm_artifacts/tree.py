"""File trees: reading one that a stranger wrote, copying it to disk for good, comparing it with its description.

A tree is read through folder descriptors and without following links (openat(2), O_NOFOLLOW), so that a name swapped
for a link in the meantime leads nowhere.
"""

import contextlib
import hashlib
import os
import secrets
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from io import RawIOBase
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from kernelm_artifacts.pickles import pickle_in
from kernelm_sdk.errors import ClientFault
from kernelm_sdk.system import Artifact, ArtifactFile

CHUNK = 1 << 20
Create = Callable[[str], AbstractContextManager[BinaryIO]]  # of a file for a path of the tree
SYNC_THREADS = 16  # concurrent fsyncs share the file system's journal commits


def digest_of(files: tuple[ArtifactFile, ...]) -> str:
    """"sha256:" + the SHA-256 of `[{"bytes":n,"path":"...","sha256":"..."},...]`: JSON in UTF-8 without white space,
    keys and files sorted (files by their path's code points), as in RFC 8785."""
    ordered = sorted(files, key=lambda f: f.path)
    return "sha256:" + hashlib.sha256(msgspec.json.encode(ordered, order="sorted")).hexdigest()


def files_of(folder: Path) -> Iterator[tuple[str, BinaryIO]]:
    """(path relative to `folder` with "/", file open for reading) of each file below it, in a fixed order.

    ClientFault "not_found" or "unsupported_file" (with `path` in its details) at a missing folder, a symbolic link, a
    device, socket or pipe, and a name that is no UTF-8 or holds control characters.
    """
    try:
        top = folder.lstat()
    except OSError as error:
        raise ClientFault("not_found", f"{folder}: {error.strerror}", "name a folder that the service may read") from None
    if not stat.S_ISDIR(top.st_mode):
        what = "a symbolic link" if stat.S_ISLNK(top.st_mode) else "no folder"
        raise ClientFault("unsupported_file", f"{folder} is {what}", "an artifact is a folder of files", path=str(folder))

    for where, folders, names, descriptor in os.fwalk(folder, onerror=_unreadable):
        folders.sort()
        prefix = "" if where == str(folder) else os.path.relpath(where, folder) + "/"
        for name in folders:
            _require(prefix + name, os.stat(name, dir_fd=descriptor, follow_symlinks=False), stat.S_ISDIR)
        for name in sorted(names):
            path = prefix + name
            _require(path, os.stat(name, dir_fd=descriptor, follow_symlinks=False), stat.S_ISREG)
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC  # non-blocking: it may be a pipe by now
            with os.fdopen(os.open(name, flags, dir_fd=descriptor), "rb", buffering=0) as file:
                _require(path, os.fstat(file.fileno()), stat.S_ISREG)
                yield path, file


def _unreadable(error: OSError) -> None:
    raise error


def _require(path: str, status: os.stat_result, wanted: Callable[[int], bool]) -> None:
    if not wanted(status.st_mode):
        what = "a symbolic link" if stat.S_ISLNK(status.st_mode) else "neither a file nor a folder"
        raise ClientFault("unsupported_file", f"{path!r} is {what}", "put the file itself in its place", path=path)
    if any(ord(c) < 32 or ord(c) == 127 or 0xD800 <= ord(c) <= 0xDFFF for c in path):
        raise ClientFault("unsupported_file", f"{path!r}: the name has control characters or is no UTF-8", "rename it",
                          path=ascii(path))  # fmt: skip


@contextlib.contextmanager
def plain_file(path: Path, _: str) -> Iterator[BinaryIO]:
    """The new, read-only file `path`, open for writing."""
    with path.open("xb", buffering=0) as sink:
        yield sink
        os.fchmod(sink.fileno(), 0o444)


def read_tree(folder: Path, create: Create | None = None) -> tuple[ArtifactFile, ...]:
    """The sorted description of the tree in `folder`, pickles refused; with `create`, every file is written to what that opens for
    its path.

    ClientFault "unsafe_file" at a pickle, "empty" where there is no file, and what `files_of` raises.
    """
    files = []
    for path, source in files_of(folder):
        if reason := pickle_in(path, source):
            raise ClientFault("unsafe_file", f"{path!r} is a pickle: {reason}", "pickles run code when they are loaded: "
                              "save tensors as safetensors, tables as Parquet", path=path)  # fmt: skip
        source.seek(0)
        if create is None:
            files.append(_hash(path, source))
        else:
            with create(path) as sink:
                files.append(_hash(path, source, sink))
    if not files:
        raise ClientFault("empty", f"{folder} holds no file", "an artifact has at least one")
    return tuple(sorted(files, key=lambda f: f.path))


def described(folder: Path, kind: str, lineage: Mapping[str, str], metadata: Mapping[str, Any]) -> Artifact:
    """The description of the files in `folder`; faults as of `read_tree`."""
    files = read_tree(folder)
    return Artifact(digest_of(files), kind, files, sum(f.bytes for f in files), time.time(), dict(lineage), dict(metadata))


def write_all(file: RawIOBase, content: bytes) -> None:
    """Write to a file without a buffer, which may take a part only."""
    while content:
        content = content[file.write(content) :]


def copy_tree(folder: Path, artifact: Artifact, target: Path,
              create: Callable[[Path, str], AbstractContextManager[BinaryIO]]) -> None:  # fmt: skip
    """Copy the tree in `folder`, which `artifact` describes, to the new folder `target`, durable and read-only; `create` opens the
    new file of a name. ClientFault "changed" if it is not as described any more."""
    target.mkdir()

    def open_(path: str) -> AbstractContextManager[BinaryIO]:
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        return create(target / path, path)

    if read_tree(folder, open_) != artifact.files:
        raise ClientFault("changed", f"{folder} changed while it was read", "put it when nothing writes to it")
    seal(target)


def _hash(path: str, source: BinaryIO, sink: BinaryIO | None = None) -> ArtifactFile:
    sha, size, buffer = hashlib.sha256(), 0, memoryview(bytearray(CHUNK))
    while count := source.readinto(buffer):  # type: ignore[attr-defined]
        chunk = buffer[:count]
        sha.update(chunk)
        size += count
        while sink is not None and chunk:
            chunk = chunk[sink.write(chunk) :]  # a nearly full disk takes less than it is given
    return ArtifactFile(path, size, sha.hexdigest())


def difference(folder: Path, files: tuple[ArtifactFile, ...]) -> tuple[str, str]:
    """The first file in `folder` that is not as described, and how it differs; ("", "") when every byte is right."""
    expected = {f.path: f for f in files}
    path = ""
    try:
        for path, file in files_of(folder):
            wanted = expected.pop(path, None)
            if wanted is None:
                return path, "does not belong to it"
            found = _hash(path, file)
            if found.bytes != wanted.bytes:
                return path, f"has {found.bytes} bytes instead of {wanted.bytes}"
            if found.sha256 != wanted.sha256:
                return path, f"has SHA-256 {found.sha256} instead of {wanted.sha256}"
    except ClientFault as fault:
        return str(fault.details.get("path", folder)), fault.message
    except OSError as error:  # a bad block
        return path or str(folder), f"can't be read: {error}"
    return (next(iter(expected)), "is missing") if expected else ("", "")


def seal(folder: Path) -> None:
    """Make everything in `folder` durable, files before the folders that name them, and folders read-only (0555)."""
    tree = [(Path(where), names) for where, _, names in os.walk(folder, topdown=False)]
    with ThreadPoolExecutor(SYNC_THREADS, "fsync") as pool:
        list(pool.map(sync, [where / name for where, names in tree for name in names]))
    for where, _ in tree:
        where.chmod(0o555)
        sync(where)


def sync(path: Path) -> None:
    """fsync(2) of a file or folder."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_durably(path: Path, content: bytes, mode: int) -> None:
    """Write the file `path`, which a crash at any point leaves whole or as it was: a temporary name, synced, renamed, the folder
    synced."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as file:
            file.write(content)
            os.fchmod(file.fileno(), mode)
        sync(temporary)
        temporary.rename(path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def remove(folder: Path) -> None:
    """Delete a tree, read-only folders included. What is gone already is no error."""
    for where, _, names in os.walk(folder):
        Path(where).chmod(0o700)
        for name in names:
            (Path(where) / name).unlink(missing_ok=True)
    for where, folders, _ in os.walk(folder, topdown=False):
        for name in folders:
            child = Path(where) / name
            child.unlink() if child.is_symlink() else child.rmdir()
    with contextlib.suppress(FileNotFoundError):
        folder.rmdir()
