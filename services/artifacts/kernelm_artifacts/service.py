"""The service `artifacts/1`: the store on the bus, and its files over HTTP."""

import asyncio
import json
import os
from pathlib import Path
from typing import Any, Protocol

from kernelm_artifacts.http import FileServer, Tokens, application
from kernelm_artifacts.settings import read_settings
from kernelm_artifacts.store import Store
from kernelm_sdk.errors import ClientFault
from kernelm_sdk.events import Event
from kernelm_sdk.system import (
    Artifact,
    ArtifactList,
    ArtifactName,
    ArtifactQuery,
    ArtifactStored,
    GrantArtifact,
    OpenArtifact,
    PutArtifact,
    ReadGrant,
)


class Publisher(Protocol):
    """What the service needs of the bus."""

    async def publish(self, event: Event) -> int: ...


class ArtifactsService:
    """Every method checks, hashes and copies in a thread; the loop stays free for calls and for HTTP."""

    def __init__(self, bus: Publisher, home: Path) -> None:
        self._bus, self._home = bus, home.resolve()
        self._settings = read_settings(os.environ)
        self._tokens = Tokens()

    async def on_start(self) -> None:
        self._store = await asyncio.to_thread(Store, self._home / "artifacts")
        self._server = FileServer(application(self._store, self._tokens), self._settings.listen, self._settings.port)
        self._url = (self._settings.url or self._server.url).rstrip("/")
        await self._server.start()
        await asyncio.to_thread(_announce, self._home / "run" / "artifacts.json", {"url": self._url, "pid": os.getpid()})

    async def on_stop(self) -> None:
        await self._server.stop()
        (self._home / "run" / "artifacts.json").unlink(missing_ok=True)
        self._store.close()

    async def put(self, request: PutArtifact, call: Any) -> Artifact:
        """Store a copy of a folder for good. The event is published at every put, since the process may have ended
        between an earlier copy and its event."""
        artifact = await asyncio.to_thread(self._put, request)
        await self._bus.publish(ArtifactStored(digest=artifact.digest, kind=artifact.kind, bytes=artifact.bytes))
        return artifact

    async def open(self, request: ArtifactName, call: Any) -> OpenArtifact:
        """The folder of an artifact on this machine, every byte verified."""
        artifact, folder = await asyncio.to_thread(self._store.open, request.digest)
        return OpenArtifact(artifact, str(folder))

    async def describe(self, request: ArtifactName, call: Any) -> Artifact:
        """What is known of an artifact. Its bytes are not read."""
        return await asyncio.to_thread(self._store.describe, request.digest)

    async def find(self, request: ArtifactQuery, call: Any) -> ArtifactList:
        """The latest artifacts of a kind, newest first."""
        return ArtifactList(await asyncio.to_thread(self._store.find, request.kind, request.limit))

    async def grant(self, request: GrantArtifact, call: Any) -> ReadGrant:
        """A URL and a bearer token with which another machine reads this one artifact for `ttl_s` seconds. The bytes
        are verified now, and by the receiver against the description."""
        if not 0 < request.ttl_s <= self._settings.grant_max_s:
            raise ClientFault("invalid", f"ttl_s is {request.ttl_s}", f"it must be 1 to {self._settings.grant_max_s} seconds")
        await asyncio.to_thread(self._store.open, request.digest)
        token, expires = self._tokens.issue(request.digest, request.ttl_s)
        return ReadGrant(f"{self._url}/artifacts/{request.digest}", token, expires)

    def _put(self, request: PutArtifact) -> Artifact:
        folder = Path(request.path)
        if not folder.is_absolute():
            raise ClientFault("invalid", f"path {request.path!r} is relative", "give an absolute path on the service's machine")
        self._refuse_private(folder)
        return self._store.put(folder, request.kind, request.lineage, request.metadata)

    def _refuse_private(self, folder: Path) -> None:
        """This service can read the system's keys and its callers may not: it must not copy them out."""
        real, home = folder.resolve(), self._home
        public = any(real.is_relative_to(home / name) for name in ("scratch", "artifacts/trees"))
        if (real.is_relative_to(home) and not public) or home.is_relative_to(real):
            raise ClientFault("permission_denied", f"{folder} holds the system's own files (keys, records, the store)",
                              f"put a folder outside of {home}, or one below its scratch/")  # fmt: skip


def _announce(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".new")
    temporary.write_text(json.dumps(content))
    temporary.replace(path)
