"""What a backup holds, and how it is written and read: one tar archive, encrypted with age, verified by digests.

    manifest.json        last: version, streams, and bytes and SHA-256 of each member before it
    streams/<name>       JetStream's own snapshots, taken while the system runs
    home/...             keys, settings, claims, and the artifacts as they lie in the store

Streams come first and artifacts last: what a record names is in the store before the record is written.
"""

import hashlib
import io
import os
import tarfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

import msgspec

from kernelm_sdk import snapshots
from kernelm_sdk.bus import Bus
from kernelm_sdk.errors import ClientFault

FORMAT = 1
MANIFEST = "manifest.json"
CHUNK = 1 << 20
KEPT = ("identity", "admin.creds", "broker/resolver", "trust")  # of a home, besides *.toml and the artifacts
SKIPPED = ("KV_leases",)  # nobody of the old life is there any more


class Member(msgspec.Struct, frozen=True):
    bytes: int
    sha256: str


class Manifest(msgspec.Struct, frozen=True):
    """The last member of the archive."""

    format: int
    kernelm: str  # version
    created: float  # Unix seconds
    streams: dict[str, Any]  # name -> configuration and state
    members: dict[str, Member]
    erased: tuple[str, ...] = ()  # artifacts that were erased while they were copied


async def spool(bus: Bus, folder: Path) -> dict[str, Any]:
    """Write a snapshot of each stream into `folder`; their configurations and states."""
    described = {}
    for name in await snapshots.streams(bus):
        if name not in SKIPPED:
            with (folder / name).open("xb") as file:
                described[name] = await snapshots.snapshot(bus, name, file.write)
    return described


class Writer:
    """Writes the archive to `sink`, which is only ever written to."""

    def __init__(self, sink: IO[bytes]) -> None:
        self._tar = tarfile.open(fileobj=sink, mode="w|", format=tarfile.PAX_FORMAT)  # noqa: SIM115 - closed by `finish`
        self.members: dict[str, Member] = {}

    def add(self, name: str, path: Path) -> None:
        """A file. FileNotFoundError, before anything is written, if it is not there any more."""
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            info = tarfile.TarInfo(name)
            info.size, info.mode, info.mtime = status.st_size, status.st_mode & 0o777, int(status.st_mtime)
            hashing = _Hashing(file)
            self._tar.addfile(info, hashing)  # type: ignore[arg-type]  # it is read and nothing else
        self.members[name] = Member(info.size, hashing.sha.hexdigest())

    def add_home(self, home: Path) -> tuple[str, ...]:
        """Everything of a home that is kept; the artifacts that were erased meanwhile, and are not whole."""
        for path in sorted(_kept(home)):
            self.add(f"home/{path.relative_to(home)}", path)
        erased = []
        trees = home / "artifacts" / "trees"
        for tree in sorted(trees.iterdir()) if trees.exists() else []:
            try:
                for path in sorted(p for p in tree.rglob("*") if p.is_file()):
                    self.add(f"home/{path.relative_to(home)}", path)
            except FileNotFoundError:
                erased.append(tree.name)
        return tuple(erased)

    def finish(self, streams: dict[str, Any], erased: tuple[str, ...]) -> Manifest:
        """Write the manifest and the end of the archive."""
        manifest = Manifest(FORMAT, version("kernelm"), time.time(), streams, self.members, erased)
        content = msgspec.json.encode(manifest)
        info = tarfile.TarInfo(MANIFEST)
        info.size, info.mode = len(content), 0o600
        self._tar.addfile(info, io.BytesIO(content))
        self._tar.close()
        return manifest


def unpack(source: IO[bytes], target: Path) -> Manifest:
    """Unpack an archive into the new folder `target`, and check every byte of it; its manifest. ClientFault "corrupt_backup"."""
    found: dict[str, Member] = {}
    manifest: Manifest | None = None
    try:
        with tarfile.open(fileobj=source, mode="r|") as tar:
            for info in tar:
                if not info.isfile():
                    raise _corrupt(f"{info.name} is no file")
                content = tar.extractfile(info)
                assert content is not None
                if info.name == MANIFEST:
                    manifest = msgspec.json.decode(content.read(), type=Manifest)
                    continue
                tarfile.data_filter(info, str(target))  # raises where a name leads out of the folder
                found[info.name] = _write(target / info.name, content, info.mode & 0o700)
    except (tarfile.TarError, msgspec.DecodeError, EOFError) as error:
        raise _corrupt(str(error)) from None
    if manifest is None:
        raise _corrupt("it has no end")
    if manifest.format != FORMAT:
        raise ClientFault("invalid", f"the backup has format {manifest.format}, and this kernelm reads {FORMAT}",
                          f"restore it with kernelm {manifest.kernelm}")  # fmt: skip
    if wrong := [name for name in found.keys() | manifest.members.keys() if found.get(name) != manifest.members.get(name)]:
        raise _corrupt(f"{sorted(wrong)[0]} is not what was saved")
    return manifest


def chunks(path: Path) -> Iterator[bytes]:
    """A stream's snapshot, in pieces that the broker takes."""
    with path.open("rb") as file:
        while chunk := file.read(snapshots.CHUNK):
            yield chunk


def _kept(home: Path) -> Iterator[Path]:
    yield from home.glob("*.toml")
    for name in KEPT:
        path = home / name
        yield from (p for p in ([path] if path.is_file() else path.rglob("*")) if p.is_file())


def _write(path: Path, content: IO[bytes], mode: int) -> Member:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    hashing, size = _Hashing(content), 0
    with path.open("xb") as file:
        while chunk := hashing.read(CHUNK):
            size += file.write(chunk)
        os.fchmod(file.fileno(), mode)
        file.flush()
        os.fsync(file.fileno())
    return Member(size, hashing.sha.hexdigest())


class _Hashing:
    """A file whose bytes are hashed as they are read."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self.sha = file, hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        self.sha.update(data)
        return data


def _corrupt(why: str) -> ClientFault:
    return ClientFault("corrupt_backup", f"the backup is damaged: {why}", "take another copy of it; nothing was changed")
