"""`python -m kernelm_artifacts.mirror`: the artifacts on a machine that is not the store's.

Instances there name it (KERNELM_MIRROR) where others ask the store: `open` fetches what is not here yet into memory, checks every
byte, and gives the folder; `put` hands a folder of this machine in. All else is the store's.
"""

import asyncio
import contextlib
import functools
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import msgspec

from kernelm_artifacts.plain import Plain
from kernelm_artifacts.room import Room
from kernelm_artifacts.service import public
from kernelm_artifacts.settings import memory_of, read_settings
from kernelm_artifacts.tree import CHUNK, described, files_of, write_all
from kernelm_sdk import tls
from kernelm_sdk.contract import method_of
from kernelm_sdk.errors import FaultBody, KernelFault, from_body
from kernelm_sdk.events import Received
from kernelm_sdk.runner import run_service
from kernelm_sdk.system import (
    Artifact,
    ArtifactErased,
    ArtifactName,
    Artifacts,
    GrantArtifact,
    OpenArtifact,
    PutArtifact,
    ReadGrant,
    WriteGrant,
)

SILENCE_S = 30.0  # of the store, while something is under way
ASK_S = 300.0  # for its answer to a call: it may have to check, or to decrypt, every byte
ERASED = f"evt.{ArtifactErased.TYPE}.*"


class Mirror:
    """A member of its own name, asked by that name alone: no route leads here."""

    def __init__(self, bus: Any, home: Path, environment: dict[str, str]) -> None:
        self._bus, self._home, self._settings = bus, home.resolve(), read_settings(environment)
        self._keeping: asyncio.Task[None] | None = None

    async def on_start(self) -> None:
        logging.getLogger("httpx").setLevel(logging.WARNING)  # it has a line for every file
        self._loop = asyncio.get_running_loop()
        self._plain = await asyncio.to_thread(Plain, memory_of(self._settings, self._home), self._settings.plain_mb * 2**20)
        self._room = Room(self._bus, self._plain, self._settings.plain_keep_s)
        self._keeping = asyncio.create_task(self._room.keep(), name="mirror-room")
        await self._bus.follow(self._erased, ERASED)

    async def on_stop(self) -> None:
        if self._keeping is not None:
            self._keeping.cancel()

    @property
    def addressed(self) -> dict[str, Any]:
        """Handlers by subject, for `Bus.serve`."""
        handlers = {"open": (method_of(Artifacts.open), self.open), "put": (method_of(Artifacts.put), self.put)}
        return {f"artifacts.v1.{name}": handler for name, handler in handlers.items()}

    async def open(self, request: ArtifactName, call: Any) -> OpenArtifact:
        """The folder of an artifact on this machine, every byte verified. That it is there is the store's to say, at each call."""
        artifact: Artifact = await self._bus.call(Artifacts.describe, request)
        return OpenArtifact(artifact, str(await self._room.have(self._copy, artifact, call.caller)))

    async def put(self, request: PutArtifact, call: Any) -> Artifact:
        """Hand a folder of this machine in; it is stored for good when this returns."""
        return await asyncio.to_thread(self._hand_in, request)

    def _copy(self, artifact: Artifact, by: str) -> Path:
        grant = functools.partial(self._ask, Artifacts.grant, GrantArtifact(artifact.digest))
        with contextlib.closing(Download(grant)) as download:
            folder, path, what = self._plain.copy(artifact, download, by)
        if path:
            raise KernelFault("corrupt_artifact", f"artifact {artifact.digest}: {path!r} {what}, as it came from the store",
                              "open it again; if that does not help, look at the store's disk", retriable=True,
                              digest=artifact.digest, path=path)  # fmt: skip
        return folder

    def _hand_in(self, request: PutArtifact) -> Artifact:
        folder = public(request.path, self._home)
        told = described(folder, request.kind, request.lineage, request.metadata)
        grant: WriteGrant = self._ask(Artifacts.accept, told)
        with _client(grant.token) as client, _reaching(grant.url):
            for name, file in files_of(folder):
                _checked(client.put(f"{grant.url}/{quote(name)}", content=file))
            answer = _checked(client.post(grant.url, timeout=ASK_S))
        return msgspec.json.decode(answer.content, type=Artifact)

    def _ask(self, method: Any, request: msgspec.Struct) -> Any:
        """The store's answer, from a thread."""
        return asyncio.run_coroutine_threadsafe(self._bus.call(method, request, timeout_s=ASK_S), self._loop).result()

    async def _erased(self, received: Received) -> None:
        if isinstance(received.event, ArtifactErased):
            await asyncio.to_thread(self._plain.drop, received.event.digest)


class Download:
    """Fetches files of one artifact. The store is asked for its `grant` at the first: it checks every byte for one."""

    def __init__(self, grant: Callable[[], ReadGrant]) -> None:
        self._grant = grant

    @functools.cached_property
    def _source(self) -> tuple[httpx.Client, str]:
        grant = self._grant()
        return _client(grant.token), grant.url

    def __call__(self, name: str, target: Path) -> None:
        """The file `name` into the new file `target`."""
        client, url = self._source
        with _reaching(url), client.stream("GET", f"{url}/{quote(name)}") as answer, target.open("xb", buffering=0) as file:
            if answer.is_error:
                answer.read()  # what is wrong
            for chunk in _checked(answer).iter_bytes(CHUNK):
                write_all(file, chunk)
        target.chmod(0o444)

    def close(self) -> None:
        """End the connection, if there is one."""
        if "_source" in vars(self):
            self._source[0].close()


def _client(token: str) -> httpx.Client:
    verify = tls.client_context() if tls.files() is not None else False  # without TLS there is nothing to verify
    return httpx.Client(headers={"authorization": f"Bearer {token}"}, verify=verify, timeout=SILENCE_S, trust_env=False)


def _checked(answer: httpx.Response) -> httpx.Response:
    """The answer if it is a good one; the fault that it tells of otherwise."""
    if answer.is_error:
        try:
            raise from_body(msgspec.json.decode(answer.content, type=FaultBody))
        except msgspec.DecodeError:
            raise KernelFault("storage", f"{answer.url} answers {answer.status_code}", "see the log of the artifacts service",
                              retriable=True) from None  # fmt: skip
    return answer


@contextlib.contextmanager
def _reaching(url: str) -> Iterator[None]:
    try:
        yield
    except httpx.TransportError as error:
        text = f"{url}: {error or type(error).__name__}"
        remedy = "KERNELM_ARTIFACTS_URL of the artifacts service must lead there from here"
        raise KernelFault("unreachable", text, remedy, retriable=True) from error


if __name__ == "__main__":
    run_service("mirror", (), lambda bus, home: Mirror(bus, home, dict(os.environ)))
