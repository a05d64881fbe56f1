"""`artifacts/1`: content-addressed file trees."""

from typing import Any, ClassVar

from msgspec import Struct

from kernelm_sdk.contract import Contract, unary
from kernelm_sdk.events import Event
from kernelm_sdk.system.common import Empty


class ArtifactName(Struct, frozen=True):
    digest: str

class ArtifactFile(Struct, frozen=True):
    path: str  # relative, with "/"
    bytes: int
    sha256: str  # hex

class Artifact(Struct, frozen=True):
    """The description of a stored tree; its digest is the SHA-256 of its sorted list of files."""

    digest: str
    kind: str  # "source", "dataset", "checkpoint", "model", ...
    files: tuple[ArtifactFile, ...]
    bytes: int
    created: float = 0.0  # Unix seconds; not part of the digest
    lineage: dict[str, str] = {}  # "job": ..., "dataset": digest; not part of the digest
    metadata: dict[str, Any] = {}

class OpenArtifact(Struct, frozen=True):
    artifact: Artifact
    path: str  # a read-only folder on the caller's machine; every byte was verified

class PutArtifact(Struct, frozen=True):
    path: str  # a folder on the service's machine, complete and closed
    kind: str
    lineage: dict[str, str] = {}
    metadata: dict[str, Any] = {}

class ArtifactQuery(Struct, frozen=True):
    kind: str = ""
    limit: int = 100

class ArtifactList(Struct, frozen=True):
    artifacts: tuple[Artifact, ...]

class GrantArtifact(Struct, frozen=True):
    digest: str
    ttl_s: int = 600

class ReadGrant(Struct, frozen=True):
    """How another machine reads one artifact over HTTP: `Authorization: Bearer <token>`, GET `url` for the description,
    `url`/<path> for a file, with ranges."""

    url: str
    token: str
    expires: int  # Unix seconds

class WriteGrant(Struct, frozen=True):
    """How another machine hands in one artifact over HTTP: `Authorization: Bearer <token>`, PUT `url`/<path> for each file, at last
    POST `url`, which answers with the description in force (`Artifact`)."""

    url: str
    token: str
    expires: int  # Unix seconds

class ArtifactStored(Event, frozen=True):
    """A tree is in the store, synced to disk."""

    TYPE: ClassVar[str] = "artifact.stored"
    digest: str
    kind: str
    bytes: int

class ArtifactErased(Event, frozen=True):
    """A tree is gone for good, and its key before it."""

    TYPE: ClassVar[str] = "artifact.erased"
    digest: str
    by: str  # who asked for it

class Artifacts(Contract, name="artifacts", major=1):
    """The content-addressed store: verified on read, written atomically, pickles refused."""

    events = (ArtifactStored, ArtifactErased)
    @unary
    async def put(self, request: PutArtifact, call: Any) -> Artifact:
        """Store a copy of a folder for good; what is there already is not written again. `disk_full` where there is no room."""
        ...
    @unary
    async def open(self, request: ArtifactName, call: Any) -> OpenArtifact:
        """A read-only folder with the files, each byte of them just verified; `corrupt_artifact` names what is not right."""
        ...
    @unary
    async def describe(self, request: ArtifactName, call: Any) -> Artifact:
        """What is known of an artifact; its bytes are not read."""
        ...
    @unary
    async def find(self, request: ArtifactQuery, call: Any) -> ArtifactList:
        """The latest artifacts of a kind, newest first."""
        ...
    @unary
    async def grant(self, request: GrantArtifact, call: Any) -> ReadGrant:
        """A URL and a token with which another machine reads this one artifact for a while."""
        ...
    @unary
    async def accept(self, request: Artifact, call: Any) -> WriteGrant:
        """A URL and a token with which another machine hands in the tree that is described; `no_room` where it does not fit."""
        ...
    @unary
    async def erase(self, request: ArtifactName, call: Any) -> Empty:
        """Forget an artifact for good, whatever its kinds; where it was encrypted, its key goes first."""
        ...
