"""The store: content-addressed, verified on read, written atomically. A pure library: no bus, no event loop.

    <root>/lock                                held by the one process that has the store open
    <root>/trees/<hex>/files/...               the tree; files 0444, folders 0555
    <root>/trees/<hex>/sealed/..., key         in its place with encryption at rest: the files encrypted, and their wrapped key
    <root>/trees/<hex>/about/<kind>.json       an `Artifact`: the same files may be a checkpoint and a model
    <root>/incoming/<random>/                  being written; emptied when the store is opened
    <root>/quarantine/<hex>-<unix ns>/         corrupt copies, for whoever wants to know what happened
"""

import errno
import fcntl
import logging
import os
import re
import secrets
import shutil
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

if TYPE_CHECKING:  # what encrypts is only there where it is asked for
    from kernelm_artifacts.sealing import Sealing
from kernelm_artifacts.tree import copy_tree, described, difference, digest_of, plain_file, remove, sync, write_durably
from kernelm_sdk.contract import token
from kernelm_sdk.errors import ClientFault, KernelFault, invalid
from kernelm_sdk.system import Artifact

DIGEST = re.compile(r"sha256:([0-9a-f]{64})\Z")
KEY, SEALED = "key", "sealed"
FULL = (errno.ENOSPC, errno.EDQUOT)
log = logging.getLogger("kernelm.artifacts")


class Store:
    """The store in the folder `root`. Thread-safe; one process at a time has it open. With `sealing`, what comes is encrypted."""

    def __init__(self, root: Path, sealing: "Sealing | None" = None) -> None:
        self.root, self._sealing = root, sealing
        self._trees, self._incoming, self._quarantine = (root / n for n in ("trees", "incoming", "quarantine"))
        self.incoming = sealing.plain.incoming if sealing is not None else self._incoming  # for what is not encrypted yet
        for folder in (self._trees, self._incoming, self._quarantine):
            folder.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(root / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            raise KernelFault("busy", f"{root}: another process has the store open", "stop that process first",
                              retriable=True) from None  # fmt: skip
        for left in self._incoming.iterdir():  # of a process that was killed while it wrote
            remove(left)
        self._index: dict[str, dict[str, Artifact]] = {}  # digest -> kind -> description
        self._guard = threading.Lock()
        for tree in self._trees.iterdir():
            self._load(tree)

    def close(self) -> None:
        """Let another process open the store."""
        os.close(self._lock)

    def put(self, folder: Path, kind: str, lineage: Mapping[str, str] | None = None,
            metadata: Mapping[str, Any] | None = None, announced: str = "") -> Artifact:  # fmt: skip
        """Store a copy of the files in `folder`, whose digest must be the `announced` one, if any. When this returns they are on
        disk for good.

        What is there already is checked and not written again; its first description of that kind stays. ClientFault:
        "unsafe_file" (a pickle), "unsupported_file", "not_found", "empty", "changed". KernelFault: "disk_full".
        """
        try:
            token(kind, "kind")
        except ValueError as error:
            raise invalid("the artifact", error) from None
        needed = 0
        try:
            artifact = described(folder, kind, lineage or {}, metadata or {})
            needed = artifact.bytes
            if announced not in ("", artifact.digest):
                raise ClientFault("changed", f"what came is {artifact.digest}, and {announced} was announced",
                                  "put it when nothing writes to it", digest=artifact.digest)  # fmt: skip
            if not self._intact(artifact.digest):
                self._receive(folder, artifact)
            return self._describe_as(artifact)
        except OSError as error:
            raise self._fault(error, folder, needed) from error

    def open(self, digest: str, by: str = "") -> tuple[Artifact, Path]:
        """The description, and the read-only folder with the files, every byte of which was just verified; the instance `by` has
        it from now on (which counts where it had to be decrypted).

        KernelFault "corrupt_artifact" when one is not right: the copy is moved aside, so that it can be put again.
        """
        artifact = self.describe(digest)
        folder, path, what = self._check(artifact, by)
        if path:
            aside = self._move_aside(digest)
            raise KernelFault("corrupt_artifact", f"artifact {digest} is corrupt: {path!r} {what}",
                              f"the copy was moved to {aside}; put the artifact again, or repeat the job that made it",
                              digest=digest, path=path)  # fmt: skip
        return artifact, folder

    def describe(self, digest: str) -> Artifact:
        """The description of a stored tree (the first one, when it was put as several kinds). ClientFault "not_found"."""
        name = self._hex(digest)
        with self._guard:
            kinds = self._index.get(digest)
            if kinds:
                return min(kinds.values(), key=lambda a: a.created)
        aside = next(self._quarantine.glob(f"{name}-*"), None)
        remedy = f"a corrupt copy of it lies in {aside}: put it again" if aside else "put it first; is the digest right?"
        raise ClientFault("not_found", f"artifact {digest} is not in the store", remedy, digest=digest)

    def find(self, kind: str = "", limit: int = 100) -> tuple[Artifact, ...]:
        """The latest `limit` artifacts of `kind` ("" for all kinds), newest first."""
        with self._guard:
            found = [a for kinds in self._index.values() for k, a in kinds.items() if kind in ("", k)]
        return tuple(sorted(found, key=lambda a: a.created, reverse=True)[: max(limit, 0)])

    def file(self, digest: str, path: str) -> Path:
        """Where the file `path` of a stored tree can be read. It is not checked, but where the tree has to be decrypted for it."""
        folder: Path | None = self._tree(digest) / "files"
        if not folder.exists():
            folder = self._sealing.plain.present(digest) if self._sealing is not None else None
        return (folder or self.open(digest)[1]) / path

    def erase(self, digest: str) -> None:
        """Forget a tree, whatever its kinds: its key first, without which the rest is noise, wherever copies of it are. ClientFault
        "not_found"."""
        self.describe(digest)
        tree = self._tree(digest)
        if (key := tree / KEY).exists():
            key.unlink()
            sync(tree)
        if self._sealing is not None:
            self._sealing.forget(digest)
        with self._guard:
            self._index.pop(digest, None)
        gone = self._incoming / secrets.token_hex(8)
        tree.rename(gone)
        sync(self._trees)
        remove(gone)

    def seal_all(self) -> tuple[int, int]:
        """Encrypt the trees that are not yet, and wrap anew the keys that an older master key wraps: how many of each. A crash in
        between leaves each tree as it was or as it shall be."""
        if self._sealing is None:
            return 0, 0
        sealed = rewrapped = 0
        for digest in list(self._index):
            tree = self._tree(digest)
            if (tree / KEY).exists():
                rewrapped += self._sealing.renew(digest, tree)
                if (tree / "files").exists():  # a crash came between the key and this
                    remove(tree / "files")
                continue
            artifact = self.open(digest)[0]
            if (tree / SEALED).exists():
                remove(tree / SEALED)
            self._sealing.receive(tree / "files", artifact, tree)
            remove(tree / "files")
            sync(tree)
            sealed += 1
        return sealed, rewrapped

    def _tree(self, digest: str) -> Path:
        return self._trees / self._hex(digest)

    def _check(self, artifact: Artifact, by: str = "") -> tuple[Path, str, str]:
        """The folder with the files; the first file that is not right, and what is wrong with it."""
        tree = self._tree(artifact.digest)
        if not (tree / KEY).exists():
            return tree / "files", *difference(tree / "files", artifact.files)
        if self._sealing is None:
            raise KernelFault("no_master_key", f"artifact {artifact.digest} is encrypted, and the service has no master key",
                              "set KERNELM_ARTIFACTS_MASTER to the key with which it was stored", digest=artifact.digest)
        return self._sealing.open(artifact, tree, by)

    # ---- writing ----

    def _intact(self, digest: str) -> bool:
        """True when the tree is stored and right. A corrupt copy is moved aside."""
        with self._guard:
            if digest not in self._index:
                return False
        _, path, what = self._check(self.describe(digest))
        if path:
            aside = self._move_aside(digest)
            log.error("artifact %s was corrupt (%r %s) and is replaced; the copy: %s", digest, path, what, aside)
        return not path

    def _receive(self, folder: Path, artifact: Artifact) -> None:
        """Copy to `incoming`, sync, rename into `trees`: a crash at any point leaves the tree whole or absent."""
        self._require_space(folder, artifact.bytes)
        incoming = self._incoming / secrets.token_hex(8)
        try:
            (incoming / "about").mkdir(parents=True)
            _write(incoming / "about" / f"{artifact.kind}.json", artifact)
            if self._sealing is not None:
                self._sealing.receive(folder, artifact, incoming)
            else:
                copy_tree(folder, artifact, incoming / "files", plain_file)
            sync(incoming)
            self._commit(incoming, self._trees / self._hex(artifact.digest))
        finally:
            if incoming.exists():
                remove(incoming)

    def _commit(self, incoming: Path, tree: Path) -> None:
        try:
            incoming.rename(tree)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            return  # somebody else was faster, with the same bytes
        sync(self._trees)

    def _describe_as(self, artifact: Artifact) -> Artifact:
        """The stored description for the kind of `artifact`, written if there is none yet."""
        about = self._trees / self._hex(artifact.digest) / "about"
        with self._guard:
            kinds = self._index.setdefault(artifact.digest, {})
            if artifact.kind not in kinds:
                path = about / f"{artifact.kind}.json"
                if path.exists():  # as it came with the tree, perhaps from a faster thread
                    artifact = msgspec.json.decode(path.read_bytes(), type=Artifact)
                else:
                    _write(path, artifact)
                kinds[artifact.kind] = artifact
            return kinds[artifact.kind]

    def _require_space(self, folder: Path, needed: int) -> None:
        if shutil.disk_usage(self.root).free < needed:
            raise self._fault(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), folder, needed)

    def _fault(self, error: OSError, folder: Path, needed: int) -> KernelFault:
        if error.errno in FULL:
            free = shutil.disk_usage(self.root).free
            return KernelFault("disk_full", f"{self.root}: no space for {folder}, which needs {needed} bytes; {free} are free",
                               f"free {max(needed - free, 0)} bytes or more there, and put it again",
                               path=str(self.root), needed_bytes=needed, free_bytes=free)  # fmt: skip
        return KernelFault("storage", f"{folder}: {error}", "look at the disk and at the permissions of that path",
                           path=str(folder))  # fmt: skip

    # ---- the index, and what is corrupt ----

    def _load(self, tree: Path) -> None:
        digest = f"sha256:{tree.name}"
        kinds: dict[str, Artifact] = {}
        try:
            for about in (tree / "about").glob("*.json"):
                artifact = msgspec.json.decode(about.read_bytes(), type=Artifact)
                if artifact.digest != digest or digest_of(artifact.files) != digest or artifact.kind != about.stem:
                    raise ValueError("it describes another artifact")
                kinds[artifact.kind] = artifact
            if not kinds:
                raise ValueError("no description")
        except (OSError, ValueError, msgspec.DecodeError) as error:
            aside = self._move_aside(digest)
            log.error("artifact %s: its description is corrupt (%s); moved to %s", digest, error, aside)
            return
        self._index[digest] = kinds

    def _move_aside(self, digest: str) -> Path:
        name = digest.removeprefix("sha256:")
        aside = self._quarantine / f"{name}-{time.time_ns()}"
        with self._guard:
            self._index.pop(digest, None)
            try:
                (self._trees / name).rename(aside)
            except FileNotFoundError:  # another reader found it corrupt at the same time
                return next(self._quarantine.glob(f"{name}-*"), self._quarantine)
        sync(self._trees)
        return aside

    @staticmethod
    def _hex(digest: str) -> str:
        match = DIGEST.match(digest)
        if match is None:
            raise ClientFault("invalid", f"{digest!r} is no digest", "a digest is 'sha256:' and 64 hex digits in lower case")
        return match[1]


def _write(path: Path, artifact: Artifact) -> None:
    """Write a description."""
    write_durably(path, msgspec.json.format(msgspec.json.encode(artifact)), 0o444)

