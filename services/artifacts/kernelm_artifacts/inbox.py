"""Trees that other machines hand in, file by file, before they are complete.

    <folder>/<random>/<path>     a file as it came; the tree goes when it was stored, or its time is over
"""

import secrets
import shutil
import time
from collections.abc import AsyncIterable
from pathlib import Path

from kernelm_artifacts.store import Store
from kernelm_artifacts.tree import digest_of, remove, write_all
from kernelm_sdk.errors import ClientFault, KernelFault
from kernelm_sdk.system import Artifact


class Inbox:
    """What comes for `store`, below `folder`, which its owner empties at the start."""

    def __init__(self, store: Store, folder: Path) -> None:
        self._store, self._folder = store, folder
        self._expected: dict[str, tuple[Artifact, float]] = {}  # name -> description, Unix seconds of its end

    def expect(self, artifact: Artifact, ttl_s: float) -> str:
        """The name under which the tree that `artifact` describes may be handed in for `ttl_s` seconds. KernelFault "no_room"."""
        for name in [name for name, (_, end) in list(self._expected.items()) if end < time.time()]:
            self._drop(name)
        if digest_of(artifact.files) != artifact.digest or sum(f.bytes for f in artifact.files) != artifact.bytes:
            raise ClientFault("invalid", f"{artifact.digest} is not the digest of the files that are described",
                              "describe what is there")  # fmt: skip
        expected = sum(promised.bytes for promised, _ in list(self._expected.values()))
        free = shutil.disk_usage(self._folder).free - expected
        if free < artifact.bytes:
            raise KernelFault("no_room", f"{self._folder}: artifact {artifact.digest} needs {artifact.bytes} bytes, and {free} are "
                              "free", "make room there, and put it again", retriable=True)  # fmt: skip
        name = secrets.token_hex(16)
        (self._folder / name).mkdir()
        self._expected[name] = artifact, time.time() + ttl_s
        return name

    async def write(self, name: str, path: str, chunks: AsyncIterable[bytes]) -> None:
        """Take the file `path`, which may come again; ClientFault "not_found", and "changed" where it is longer than described."""
        artifact = self._of(name)
        described = next((f for f in artifact.files if f.path == path), None)  # so no path leads out of the tree
        if described is None:
            raise ClientFault("not_found", f"artifact {artifact.digest} has no file {path!r}", "its description lists them")
        target, left = self._folder / name / path, described.bytes
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f".{secrets.token_hex(8)}")
        try:
            with part.open("xb", buffering=0) as file:
                async for chunk in chunks:
                    left -= len(chunk)
                    if left < 0:
                        raise ClientFault("changed", f"{path!r} is longer than the {described.bytes} bytes that were announced",
                                          "put it when nothing writes to it")  # fmt: skip
                    write_all(file, chunk)
            part.replace(target)
        except OSError as error:
            raise KernelFault("storage", f"{path!r} can't be kept: {error}", "look at memory and disk of the artifacts service",
                              retriable=True) from error  # fmt: skip
        finally:
            part.unlink(missing_ok=True)

    def close(self, name: str) -> Artifact:
        """Store the tree for good; ClientFault "changed" where it is not what was announced."""
        told = self._of(name)
        try:
            stored = self._store.put(self._folder / name, told.kind, told.lineage, told.metadata, told.digest)
        except ClientFault:
            self._drop(name)
            raise
        self._drop(name)
        return stored

    def _of(self, name: str) -> Artifact:
        if (found := self._expected.get(name)) is None:
            raise ClientFault("not_found", "nothing is expected here any more", "get a new address with artifacts/1.accept")
        return found[0]

    def _drop(self, name: str) -> None:
        self._expected.pop(name, None)
        remove(self._folder / name)
