"""The service `artifacts/1`: the store on the bus, and its files over HTTP."""

import asyncio
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, Protocol, TypeVar

from kernelm_artifacts.http import FileServer, Tokens, application
from kernelm_artifacts.inbox import Inbox
from kernelm_artifacts.room import Room
from kernelm_artifacts.settings import Settings, read_settings
from kernelm_artifacts.store import Store
from kernelm_sdk.errors import ClientFault
from kernelm_sdk.events import Event
from kernelm_sdk.system import (
    Artifact,
    ArtifactErased,
    ArtifactList,
    ArtifactName,
    ArtifactQuery,
    ArtifactStored,
    Empty,
    GrantArtifact,
    OpenArtifact,
    PutArtifact,
    ReadGrant,
    WriteGrant,
)

if TYPE_CHECKING:  # imported where encryption is asked for
    from kernelm_artifacts.sealing import Sealing

P, T = ParamSpec("P"), TypeVar("T")
log = logging.getLogger("kernelm.artifacts")


class Publisher(Protocol):
    """What the service needs of the bus."""

    async def publish(self, event: Event) -> int: ...
    async def call(self, method: Any, request: Any) -> Any: ...


class ArtifactsService:
    """Every method checks, hashes and copies in a thread; the loop stays free for calls and for HTTP."""

    def __init__(self, bus: Publisher, home: Path) -> None:
        self._bus, self._home = bus, home.resolve()
        self._settings = read_settings(os.environ)
        self._tokens = Tokens()
        self._room: Room | None = None  # for readable copies, where there are such
        self._keeping: asyncio.Task[None] | None = None

    async def on_start(self) -> None:
        self._sealing = _sealing(self._settings, self._home)
        self._store = await asyncio.to_thread(Store, self._home / "artifacts", self._sealing)
        sealed, rewrapped = await asyncio.to_thread(self._store.seal_all)
        if sealed or rewrapped:
            log.info("encryption at rest: %d artifacts encrypted, %d keys wrapped by the new master key", sealed, rewrapped)
        if self._sealing is not None:
            self._room = Room(self._bus, self._sealing.plain, self._settings.plain_keep_s)
            self._keeping = asyncio.create_task(self._room.keep(), name="artifacts-room")
        self._inbox = Inbox(self._store, self._store.incoming)
        served = application(self._store, self._tokens, self._locate, self._inbox, self._close)
        self._server = FileServer(served, self._settings.listen, self._settings.port)
        self._url = (self._settings.url or self._server.url).rstrip("/")
        await self._server.start()
        await asyncio.to_thread(_announce, self._home / "run" / "artifacts.json", {"url": self._url, "pid": os.getpid()})

    async def on_stop(self) -> None:
        if self._keeping is not None:
            self._keeping.cancel()
        await self._server.stop()
        (self._home / "run" / "artifacts.json").unlink(missing_ok=True)
        self._store.close()

    async def put(self, request: PutArtifact, call: Any) -> Artifact:
        """Store a copy of a folder for good. The event is published at every put, since the process may have ended
        between an earlier copy and its event."""
        artifact = await self._with_room(self._put, request)
        await self._bus.publish(ArtifactStored(digest=artifact.digest, kind=artifact.kind, bytes=artifact.bytes))
        return artifact

    async def open(self, request: ArtifactName, call: Any) -> OpenArtifact:
        """The folder of an artifact on this machine, every byte verified."""
        artifact, folder = await self._with_room(self._store.open, request.digest, call.caller)
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
        await self._with_room(self._store.open, request.digest)
        token, expires = self._tokens.issue(request.digest, request.ttl_s)
        return ReadGrant(f"{self._url}/artifacts/{request.digest}", token, expires)

    async def accept(self, request: Artifact, call: Any) -> WriteGrant:
        """A URL and a bearer token with which another machine hands in the files that are described, within the longest life of a
        grant."""
        ttl_s = self._settings.grant_max_s
        name = await self._with_room(self._inbox.expect, request, ttl_s)
        token, expires = self._tokens.issue(name, ttl_s)
        return WriteGrant(f"{self._url}/incoming/{name}", token, expires)

    async def erase(self, request: ArtifactName, call: Any) -> Empty:
        """Forget an artifact for good. Where it was encrypted, its key goes first."""
        await asyncio.to_thread(self._store.erase, request.digest)
        await self._bus.publish(ArtifactErased(digest=request.digest, by=call.caller))
        return Empty()

    async def _locate(self, digest: str, path: str) -> Path:
        return await self._with_room(self._store.file, digest, path)

    async def _close(self, name: str) -> Artifact:
        """What was handed in under `name`, stored; the same as `put` from here on."""
        artifact = await self._with_room(self._inbox.close, name)
        await self._bus.publish(ArtifactStored(digest=artifact.digest, kind=artifact.kind, bytes=artifact.bytes))
        return artifact

    async def _with_room(self, work: Callable[P, T], *arguments: P.args, **named: P.kwargs) -> T:
        """What `work` returns, in a thread; readable copies that nobody has any more make way for it."""
        have = asyncio.to_thread if self._room is None else self._room.have
        return await have(work, *arguments, **named)

    def _put(self, request: PutArtifact) -> Artifact:
        return self._store.put(public(request.path, self._home), request.kind, request.lineage, request.metadata)


def public(path: str, home: Path) -> Path:
    """The folder at `path`, if it may be copied from there: a service can read the system's keys, which its callers may not, and
    would copy them out. ClientFault "permission_denied"; "invalid" for a relative path."""
    folder = Path(path)
    if not folder.is_absolute():
        raise ClientFault("invalid", f"path {path!r} is relative", "give an absolute path on the service's machine")
    real = folder.resolve()
    granted = any(real.is_relative_to(home / name) for name in ("scratch", "artifacts/trees"))
    if (real.is_relative_to(home) and not granted) or home.is_relative_to(real):
        raise ClientFault("permission_denied", f"{folder} holds the system's own files (keys, records, the store)",
                          f"put a folder outside of {home}, or one below its scratch/")  # fmt: skip
    return folder


def _sealing(settings: Settings, home: Path) -> "Sealing | None":
    if not settings.master:
        return None
    try:
        from kernelm_artifacts.sealing import Sealing
    except ImportError as error:
        raise ClientFault("invalid", f"KERNELM_ARTIFACTS_MASTER asks for encryption: {error}",
                          "pip install 'kernelm-artifacts[encryption]'") from None  # fmt: skip
    return Sealing.of(settings, home)


def _announce(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".new")
    temporary.write_text(json.dumps(content))
    temporary.replace(path)
