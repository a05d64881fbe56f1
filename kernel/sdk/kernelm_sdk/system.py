"""The contracts that the kernel itself speaks: `kernel/1`, `node/1`, `plugin/1`, `work/1`, `artifacts/1`, and their events.

`jobs/1` and the subsystems are declared in `kernelm_contracts`; nothing here knows one by name.
Units: `cpu` in cores, `_mb` in 2**20 bytes, `_s` in seconds, `bytes` in bytes. A digest is "sha256:<64 hex digits>".
"""

from typing import Any, ClassVar, Literal

import msgspec

from kernelm_sdk.contract import Contract, unary
from kernelm_sdk.errors import FaultBody
from kernelm_sdk.events import Event

Struct = msgspec.Struct

class Empty(Struct, frozen=True):
    """Nothing to say: the request or reply of methods that need none."""

class Resources(Struct, frozen=True, forbid_unknown_fields=True):
    """What a job or an instance asks for, or a node has."""

    cpu: float = 1.0  # cores
    memory_mb: int = 512
    gpus: int = 0

# ---- kernel/1: identity, instances, pools, routes, keys ----------------------------------------------------------

class EnrollRequest(Struct, frozen=True):
    token: str  # the one-time join token, as it was issued
    public_key: str  # the joiner's own public nkey ("U..."); its seed never leaves the joiner

class RenewRequest(Struct, frozen=True):
    public_key: str  # of the caller; the same as at enrollment

class Enrolled(Struct, frozen=True):
    user: str  # the caller's name: the last token of every subject it may publish on
    jwt: str
    expires: int  # Unix seconds; reconnect with a renewed JWT before

class ContractVersion(Struct, frozen=True):
    id: str  # "name/major"
    schema_hash: str

class Hello(Struct, frozen=True):
    instance: str
    plugin: str
    version: str
    contracts: tuple[ContractVersion, ...]

class Welcome(Struct, frozen=True):
    pool: str
    contracts: tuple[str, ...]  # those agreed on: the highest common majors
    lease_ttl_s: int  # renew the lease every third of it, or be taken for dead
    settings: dict[str, Any]  # the plugin's settings, validated by the plugin against its own struct

class Ready(Struct, frozen=True):
    instance: str
    models: tuple[str, ...] = ()  # names of the deployments that this instance answers for

class Instance(Struct, frozen=True):
    id: str
    plugin: str
    version: str
    pool: str
    node: str
    state: str  # of kernelm.lifecycle
    contracts: tuple[str, ...] = ()
    models: tuple[str, ...] = ()
    since: float = 0.0  # Unix seconds of the last change of state
    reason: str = ""  # why it is in this state, if that needs saying

class PoolSpec(Struct, frozen=True):
    """Desired state: which plugin runs how often, with which settings. The supervisor makes it so, and keeps it so."""

    pool: str
    plugin: str
    instances: int = 1  # in all; 0 with `each_node`
    each_node: bool = False
    node: str = ""  # run on this node only (as the scheduler decided); "" for any
    runtime: str = "process"
    settings: dict[str, Any] = {}
    models: tuple[str, ...] = ()  # deployments that the pool's instances may serve
    contracts: bool = True  # route the plugin's contracts to this pool; a model's pool says False

class PoolName(Struct, frozen=True):
    pool: str

class Destination(Struct, frozen=True):
    pool: str
    weight: int  # percent; the weights of a route sum to 100

class Route(Struct, frozen=True):
    """Where calls go: `name` is "data/1" for a contract and "news" for a model."""

    name: str
    kind: Literal["svc", "model"]
    to: tuple[Destination, ...]
    generation: int = 0  # of a model; grows by one at every change
    artifact: str = ""  # digest of the model that is served
    why: str = ""

class SystemState(Struct, frozen=True):
    instances: tuple[Instance, ...]
    pools: tuple[PoolSpec, ...]
    routes: tuple[Route, ...]
    leader_epoch: int
    health: dict[str, str] = {}  # "journal": "intact", "routes": "in force"; what is not well says why

class ExitReport(Struct, frozen=True):
    instance: str
    code: int  # negative: the signal
    diagnosis: str = ""  # advice, with the last lines of its log

class KeyRequest(Struct, frozen=True):
    name: str
    models: tuple[str, ...] = ("*",)
    methods: tuple[str, ...] = ("*",)
    tenant: str = "default"
    expires_s: int = 0  # seconds from now; 0 for never
    public_key: str = ""  # nkey of a NATS client that gets a JWT with the same rights; "" for HTTP and gRPC only

class Key(Struct, frozen=True):
    """An API key as it is stored: the secret itself is shown once and kept only as a hash."""

    id: str
    name: str
    hash: str  # SHA-256 of the secret, hex; the secret has 256 random bits, so no slow hash is needed
    models: tuple[str, ...]
    methods: tuple[str, ...]
    tenant: str
    created: int  # Unix seconds
    expires: int = 0
    revoked: bool = False
    public_key: str = ""

class KeyCreated(Struct, frozen=True):
    key: Key
    secret: str  # "km_<id>_<random>", shown this once
    jwt: str = ""  # for `public_key`

class KeyList(Struct, frozen=True):
    keys: tuple[Key, ...]

class KeyName(Struct, frozen=True):
    id: str

class InstanceChanged(Event, frozen=True):
    """An instance went from one state of the lifecycle to another."""

    TYPE: ClassVar[str] = "plugin.state"
    instance: str
    plugin: str
    pool: str
    state: str
    was: str
    reason: str = ""

class RouteChanged(Event, frozen=True):
    """A route is in force in the broker."""

    TYPE: ClassVar[str] = "route.changed"
    route: Route
    took_ms: float

class KeyChanged(Event, frozen=True):
    """An API key was created or revoked."""

    TYPE: ClassVar[str] = "key.changed"
    id: str
    name: str
    change: Literal["created", "revoked"]
    by: str

class Kernel(Contract, name="kernel", major=1):
    """The control plane: who is there, who may do what, and where calls go."""

    events = (InstanceChanged, RouteChanged, KeyChanged)
    @unary
    async def enroll(self, request: EnrollRequest, call: Any) -> Enrolled: ...
    @unary
    async def renew(self, request: RenewRequest, call: Any) -> Enrolled: ...
    @unary
    async def hello(self, request: Hello, call: Any) -> Welcome: ...
    @unary
    async def ready(self, request: Ready, call: Any) -> Instance: ...
    @unary
    async def exited(self, request: ExitReport, call: Any) -> Empty: ...
    @unary
    async def state(self, request: Empty, call: Any) -> SystemState: ...
    @unary
    async def start_pool(self, request: PoolSpec, call: Any) -> PoolSpec: ...
    @unary
    async def stop_pool(self, request: PoolName, call: Any) -> Empty: ...
    @unary
    async def set_route(self, request: Route, call: Any) -> Route: ...
    @unary
    async def create_key(self, request: KeyRequest, call: Any) -> KeyCreated: ...
    @unary
    async def list_keys(self, request: Empty, call: Any) -> KeyList: ...
    @unary
    async def revoke_key(self, request: KeyName, call: Any) -> Key: ...

# ---- node/1 and plugin/1: starting instances, and speaking to one ------------------------------------------------

class StartInstance(Struct, frozen=True):
    instance: str
    plugin: str
    pool: str
    runtime: str
    token: str  # one-time join token for this instance
    needs: Resources = Resources()

class InstanceName(Struct, frozen=True):
    instance: str
    grace_s: float = 5.0  # between the polite request and the kill

class Running(Struct, frozen=True):
    instance: str
    pool: str
    plugin: str
    runtime: str
    pid: int  # 0 where the runtime has none of its own

class NodeReport(Struct, frozen=True):
    node: str
    capacity: Resources
    free: Resources  # what the machine has left by its own account, not by the scheduler's
    running: tuple[Running, ...]
    plugins: dict[str, str] = {}  # installed here: name -> version
    runtimes: dict[str, tuple[str, ...]] = {}  # runtime -> what it can do: kill, cpu_limit, memory_limit, isolation

class Diagnosis(Struct, frozen=True):
    instance: str
    advice: str
    log: str  # the last lines

class Node(Contract, name="node", major=1):
    """One machine: reports its resources, starts and stops instances in their runtimes."""
    @unary
    async def start(self, request: StartInstance, call: Any) -> Running: ...
    @unary
    async def stop(self, request: InstanceName, call: Any) -> Empty: ...
    @unary
    async def report(self, request: Empty, call: Any) -> NodeReport: ...
    @unary
    async def diagnose(self, request: InstanceName, call: Any) -> Diagnosis: ...

class CancelJob(Struct, frozen=True):
    job: str
    epoch: int
    reason: str = ""

class Probe(Struct, frozen=True):
    instance: str
    uptime_s: float
    jobs: tuple[str, ...]  # "<job>/<epoch>" at work
    in_flight: int  # calls being answered
    answered: int
    failed: int
    rss_mb: float

class DrainRequest(Struct, frozen=True):
    deadline_s: float = 30.0

class Lifecycle(Contract, name="plugin", major=1):
    """What every instance answers to on `inst.<instance>.plugin.v1.<verb>`; the runner implements it, not the plugin."""
    @unary
    async def probe(self, request: Empty, call: Any) -> Probe: ...
    @unary
    async def cancel(self, request: CancelJob, call: Any) -> Empty: ...
    @unary
    async def drain(self, request: DrainRequest, call: Any) -> Probe: ...
    @unary
    async def stop(self, request: Empty, call: Any) -> Empty: ...

# ---- work/1: how an instance reports on a job that it was given --------------------------------------------------

class Dispatch(Struct, frozen=True):
    """The body of the call that hands a job to an instance."""

    job: str
    epoch: int
    attempt: int
    request: msgspec.Raw
    checkpoint: str = ""  # digest of the last one, to resume from
    run: str = ""
    name: str = ""

class Progress(Struct, frozen=True):
    fraction: float = 0.0  # 0 to 1 within the job
    phase: str = ""
    message: str = ""
    metrics: dict[str, float] = {}
    deadline_s: float = 600.0  # the phase declares it: without progress for so long, the job is taken away

class Report(Struct, frozen=True):
    """A worker's word on its job. Refused with `stale_epoch` when the job has another owner by now."""

    job: str
    epoch: int
    progress: Progress | None = None
    checkpoint: str = ""  # digest of a new one
    result: dict[str, Any] | None = None
    fault: FaultBody | None = None

class Work(Contract, name="work", major=1):
    """Where the runner reports on a job; the job table implements it. Of the jobs themselves the kernel knows no more."""
    @unary
    async def report(self, request: Report, call: Any) -> Empty: ...

# ---- artifacts/1: content-addressed file trees -------------------------------------------------------------------

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

class ArtifactStored(Event, frozen=True):
    """A tree is in the store, synced to disk."""

    TYPE: ClassVar[str] = "artifact.stored"
    digest: str
    kind: str
    bytes: int

class Artifacts(Contract, name="artifacts", major=1):
    """The content-addressed store: verified on read, written atomically, pickles refused."""

    events = (ArtifactStored,)
    @unary
    async def put(self, request: PutArtifact, call: Any) -> Artifact: ...
    @unary
    async def open(self, request: ArtifactName, call: Any) -> OpenArtifact: ...
    @unary
    async def describe(self, request: ArtifactName, call: Any) -> Artifact: ...
    @unary
    async def find(self, request: ArtifactQuery, call: Any) -> ArtifactList: ...
    @unary
    async def grant(self, request: GrantArtifact, call: Any) -> ReadGrant: ...
