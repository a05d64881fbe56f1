"""`kernel/1`: identity, instances, pools, routes, swaps, keys."""

from typing import Any, ClassVar, Literal

from msgspec import Struct

from kernelm_sdk.contract import TOKEN, Contract, unary
from kernelm_sdk.errors import FaultBody
from kernelm_sdk.events import Event
from kernelm_sdk.system.common import Empty, Manifest, Resources


class EnrollRequest(Struct, frozen=True):
    token: str  # the one-time join token, as it was issued
    public_key: str  # the joiner's own public nkey ("U..."); its seed never leaves the joiner

class RenewRequest(Struct, frozen=True):
    public_key: str  # the caller's from now on: a new one rotates its key, and the old one is refused after `overlap_s`
    overlap_s: int = 60

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
    fault: FaultBody | None = None  # with which it ended where it could not load, and its machine is not to blame

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
    source: str = ""  # digest of an artifact with the plugin's files; "" for a plugin that is installed on the nodes
    image: str = ""  # of a container: its id or digest; "" for the node's own runner image
    artifacts: tuple[str, ...] = ()  # digests that a container may read
    parked: bool = False  # not run, only kept, so that a rollback finds it
    needs: Resources | None = None  # of one instance; None for the manifest's
    places: dict[str, int] = {}  # node -> how many of `instances` run there; {} for all on `node`

    def __post_init__(self) -> None:
        if self.places and (sum(self.places.values()) != self.instances or min(self.places.values()) < 1):
            raise ValueError(f"`places` of pool {self.pool} is {self.places}, and must share out `instances`, {self.instances}")

    @property
    def spread(self) -> dict[str, int]:
        """Node -> instances that are to run there; "" for any node."""
        return self.places or {self.node: self.instances}

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
    generation: int = 0  # grows by one at every change
    artifact: str = ""  # digest of the model that is served
    why: str = ""

class LoadedPlugin(Struct, frozen=True):
    """A plugin that can be run: its manifest, and where its files are."""

    manifest: Manifest
    source: str = ""  # digest of the artifact; "" for one that is installed on the nodes

class Bounds(Struct, frozen=True, forbid_unknown_fields=True):
    """When a swap goes back by itself: within `watch_s` of taking calls, once the new pool is worse than this."""

    watch_s: float = 30.0  # 0: the old pool is stopped at once, and nothing is watched
    error_rate: float = 0.01  # share of calls that fail, beyond the old pool's share in the same time
    latency_ratio: float = 2.0  # p99 over the old pool's; without calls to compare with it is not judged
    latency_ms: float = 20.0  # p99 up to here is never too slow
    min_calls: int = 20  # before any judgement
    ready_s: float = 180.0  # patience with the new pool's start

class SwapRequest(Struct, frozen=True):
    to: PoolSpec
    routes: tuple[str, ...]  # names of the routes that move: "data/1", or a deployment's "news"
    before: str = ""  # the pool that serves them now, drained and parked when the swap is done; "" for none
    generation: int = 0  # of the routes when it is done; 0 for one more than now
    artifact: str = ""  # digest of the model that is served, for a deployment
    canary: int = 0  # percent of the calls during the watch; 0 for all at once
    bounds: Bounds = Bounds()
    why: str = ""

class LoadRequest(Struct, frozen=True):
    plugin: str = ""  # the name of one that is known, or
    manifest: str = ""  # the text of kernelm-plugin.toml, and
    source: str = ""  # the digest of an artifact with the plugin's files
    replaces: str = ""  # a pool, a plugin or a contract whose pool is replaced; "" to serve what nobody serves yet
    runtime: str = ""  # "" for the manifest's first
    instances: int = 0  # 0: as many as the pool that is replaced, else 1
    settings: dict[str, Any] | None = None  # None: those of the pool that is replaced, when it is of the same plugin
    image: str = ""
    artifacts: tuple[str, ...] = ()
    canary: int = 0  # percent of the calls during the watch; 0 for all at once
    bounds: Bounds = Bounds()
    why: str = ""

class RollbackRequest(Struct, frozen=True):
    pool: str  # a pool, a plugin, a contract or a deployment
    why: str = ""

class UnloadRequest(Struct, frozen=True):
    pool: str  # a pool or a plugin
    force: bool = False  # even if the contracts that it serves are then served by nobody
    why: str = ""

class ScaleRequest(Struct, frozen=True):
    pool: str  # a pool, a plugin or a contract
    instances: int

class Swap(Struct, frozen=True):
    """One replacement of a pool by another, from its beginning to its end; kept in the broker, so that it goes on when
    the kernel is killed in its middle."""

    id: str
    pool: str  # the new one
    before: str  # the one that served; "" for none
    routes: tuple[str, ...]
    phase: Literal["starting", "watching", "retiring", "done", "rolled_back", "failed"]
    by: str  # who asked for it
    why: str
    begun: float  # Unix seconds
    canary: int = 0
    bounds: Bounds = Bounds()
    generation: int = 0
    artifact: str = ""
    since: float = 0.0  # Unix seconds of the phase
    took_ms: float = 0.0  # the change of the routes in the broker
    outcome: str = ""  # what decided it, with the figures

    @property
    def over(self) -> bool:
        """Whether nothing more comes of it."""
        return self.phase in ("done", "rolled_back", "failed")

class SystemState(Struct, frozen=True):
    instances: tuple[Instance, ...]
    pools: tuple[PoolSpec, ...]
    routes: tuple[Route, ...]
    leader_epoch: int
    health: dict[str, str] = {}  # "journal": "intact", "routes": "in force"; what is not well says why
    plugins: tuple[LoadedPlugin, ...] = ()  # those installed, and those loaded as artifacts
    swaps: tuple[Swap, ...] = ()  # under way, and the last of those that are over

class ExitReport(Struct, frozen=True):
    instance: str
    code: int  # negative: the signal
    diagnosis: str = ""  # advice, with the last lines of its log
    fault: FaultBody | None = None  # as in `Instance`, in the instance's own words, without details

    @property
    def reason(self) -> str:
        """For people."""
        return self.diagnosis or f"exit code {self.code}"

class KeyRequest(Struct, frozen=True):
    name: str
    models: tuple[str, ...] = ("*",)
    methods: tuple[str, ...] = ("*",)
    tenant: str = "default"
    expires_s: int = 0  # seconds from now; 0 for never
    public_key: str = ""  # nkey of a NATS client that gets a JWT with the same rights; "" for HTTP and gRPC only
    admin: bool = False  # may also manage plugins, pools and routes through the gateway

    def __post_init__(self) -> None:
        for field, names in (("models", self.models), ("methods", self.methods)):
            if wrong := next((n for n in names if n != "*" and not TOKEN.match(n)), None):  # the broker would refuse all of its JWT
                raise ValueError(f"`{field}` has {wrong!r}: a name is made of a-z, 0-9 and '-', and * alone means all")

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
    admin: bool = False
    previous_hash: str = ""  # of the secret before the last rotation,
    previous_until: int = 0  # accepted until then, Unix seconds

class KeyCreated(Struct, frozen=True):
    key: Key
    secret: str  # "km_<id>_<random>", shown this once
    jwt: str = ""  # for `public_key`

class KeyList(Struct, frozen=True):
    keys: tuple[Key, ...]

class KeyName(Struct, frozen=True):
    id: str

class RotateKey(Struct, frozen=True):
    id: str
    overlap_s: int = 0  # seconds for which the old secret is still accepted
    public_key: str = ""  # of a NATS client: its new nkey

class MachineName(Struct, frozen=True):
    name: str  # of a further machine: "two"

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

class SwapChanged(Event, frozen=True):
    """A swap came to another phase: who wanted it, what it changes, why, and what decided it."""

    TYPE: ClassVar[str] = "swap.phase"
    swap: Swap
    was: str

class KeyChanged(Event, frozen=True):
    """An API key was created or revoked."""

    TYPE: ClassVar[str] = "key.changed"
    id: str
    name: str
    change: Literal["created", "rotated", "revoked"]
    by: str

class Kernel(Contract, name="kernel", major=1):
    """The control plane: who is there, who may do what, and where calls go."""

    events = (InstanceChanged, RouteChanged, SwapChanged, KeyChanged)
    @unary
    async def enroll(self, request: EnrollRequest, call: Any) -> Enrolled:
        """Trade a one-time join token and one's own public key for a JWT."""
        ...
    @unary
    async def renew(self, request: RenewRequest, call: Any) -> Enrolled:
        """A fresh JWT, for the same key or for a new one."""
        ...
    @unary
    async def hello(self, request: Hello, call: Any) -> Welcome:
        """Say who one is and which contracts one speaks; the answer says what was agreed on, if anything: `version_mismatch`."""
        ...
    @unary
    async def ready(self, request: Ready, call: Any) -> Instance:
        """Be routed to from now on."""
        ...
    @unary
    async def exited(self, request: ExitReport, call: Any) -> Empty:
        """A node tells how an instance ended."""
        ...
    @unary
    async def state(self, request: Empty, call: Any) -> SystemState:
        """All that the kernel knows of: instances, pools, routes, swaps, and what is not well."""
        ...
    @unary
    async def start_pool(self, request: PoolSpec, call: Any) -> PoolSpec:
        """Run a plugin in a pool of its own, as many instances as it says."""
        ...
    @unary
    async def stop_pool(self, request: PoolName, call: Any) -> Empty:
        """Drain a pool and stop it."""
        ...
    @unary
    async def set_route(self, request: Route, call: Any) -> Route:
        """Send the calls of a name to other pools, from the next message on."""
        ...
    @unary
    async def load(self, request: LoadRequest, call: Any) -> Swap:
        """Bring in a plugin: its pool starts, and takes its contracts over from `replaces`, or those that nobody serves."""
        ...
    @unary
    async def swap(self, request: SwapRequest, call: Any) -> Swap:
        """Start the pool `to` and move routes to it."""
        ...
    @unary
    async def rollback(self, request: RollbackRequest, call: Any) -> Swap:
        """Bring back what served before the last swap: at once while that is being watched, by a swap of its own after."""
        ...
    @unary
    async def unload(self, request: UnloadRequest, call: Any) -> Empty:
        """Drain and stop a pool, and withdraw the routes that end there."""
        ...
    @unary
    async def scale(self, request: ScaleRequest, call: Any) -> PoolSpec:
        """Change how many instances a pool has."""
        ...
    @unary
    async def create_key(self, request: KeyRequest, call: Any) -> KeyCreated:
        """An API key; its secret is in this answer and nowhere else."""
        ...
    @unary
    async def list_keys(self, request: Empty, call: Any) -> KeyList:
        """All API keys, without their secrets."""
        ...
    @unary
    async def rotate_key(self, request: RotateKey, call: Any) -> KeyCreated:
        """A new secret for a key; the old one is accepted for `overlap_s` more."""
        ...
    @unary
    async def revoke_key(self, request: KeyName, call: Any) -> Key:
        """Shut a key out, within a second."""
        ...
    @unary
    async def forget_machine(self, request: MachineName, call: Any) -> Empty:
        """Shut out a further machine with all that runs there; it comes back only with tokens that are made for it anew."""
        ...
