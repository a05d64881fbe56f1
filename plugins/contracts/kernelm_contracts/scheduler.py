"""`scheduler/1`: who runs where, as a pure function of the state of the cluster.

Units: `cpu` in cores, `_mb` in 2**20 bytes, `_s` in seconds, `_ms` in milliseconds, other times in Unix seconds. A job is one or
more *members* (workers), each of which asks for `request`; accelerators are devices of a type. The job table checks every decision.
"""

from collections.abc import Iterator
from typing import Any, Literal

from msgspec import Struct

from kernelm_sdk.contract import Contract, unary
from kernelm_sdk.errors import ClientFault
from kernelm_sdk.system import Resources

Action = Literal["place", "wait", "reject", "preempt", "migrate", "resize", "scale"]


class Devices(Struct, frozen=True, gc=False):
    """The accelerators of one type on a node; `Resources.gpus` counts them over all types."""

    type: str  # "a100"; "" for any
    count: int
    free: int  # as `NodeState.free`
    memory_mb: int = 0  # of one; 0 for not known
    link: str = ""  # nodes of one name are joined by a fast link (NVLink domain, InfiniBand leaf)


class NodeState(Struct, frozen=True, gc=False):
    name: str
    capacity: Resources
    free: Resources  # capacity less what the placed and running jobs have requested
    plugins: dict[str, int] = {}  # plugin -> how many more members its instances here can take
    artifacts: tuple[str, ...] = ()  # digests in its cache
    devices: tuple[Devices, ...] = ()  # () where the types are not known
    models: tuple[str, ...] = ()  # digests that are loaded here


class Point(Struct, frozen=True, array_like=True, gc=False):
    """One point of a speed-up curve: `[members, speed]` in JSON."""

    members: int
    speed: float  # progress per second

    def __iter__(self) -> Iterator[float]:
        return iter((self.members, self.speed))


class Speed(Struct, frozen=True, gc=False):
    """How fast a job gets on with devices of one type, as measured or estimated last: its goodput (Pollux, OSDI 2021)."""

    type: str  # of the devices; "" for a job that needs none, or any type
    points: tuple[Point, ...]  # by members; between them linear, beyond the last flat


class Share(Struct, frozen=True, gc=False):
    """A part of an allocation."""

    node: str
    members: int = 1
    type: str = ""  # of the devices


class PendingJob(Struct, frozen=True, gc=False):
    id: str
    name: str
    request: Resources  # of one member
    plugins: tuple[str, ...]  # any of these can do it
    priority: int = 0  # higher first
    tenant: str = "default"
    submitted: float = 0.0
    attempt: int = 0
    artifacts: tuple[str, ...] = ()  # what it will read
    avoid: tuple[str, ...] = ()  # nodes on which it has failed
    members: int = 1  # fewest it runs with: a gang, all or nothing, over one or more nodes
    most: int = 0  # members it can use; 0 for `members`: it is not elastic
    speeds: tuple[Speed, ...] = ()  # per acceptable type, one type at a time; () for any type, and no curve
    device_mb: int = 0  # memory that each device must have
    within: Literal["", "node", "link"] = ""  # all members on one node, or behind one fast link
    done: float = 0.0  # progress, in the unit of `speeds`
    remaining: float = 0.0  # progress left, in the unit of `speeds`; 0 for not known
    estimate_s: float = 0.0  # run time left with `members` members, without a curve; 0 for not known
    deadline: float = 0.0  # 0 for none
    preemptible: bool = False  # may be stopped for any other (burst); others only for higher priority, or a quota's owner
    restart_s: float = 0.0  # to stop at a checkpoint, and to be at work again
    served_s: float = 0.0  # device seconds it has had (member seconds where it uses no devices)
    started: float = 0.0  # first time; 0 for never
    preemptions: int = 0
    model: str = ""  # the served model of which it is a replica


class PlacedJob(Struct, frozen=True, gc=False):
    id: str
    node: str  # of its first member
    request: Resources  # of one member
    priority: int = 0
    tenant: str = "default"
    started: float = 0.0  # on this allocation
    allocation: tuple[Share, ...] = ()  # () for one member on `node`
    name: str = ""
    plugins: tuple[str, ...] = ()  # from here on as in `PendingJob`
    submitted: float = 0.0
    attempt: int = 0
    artifacts: tuple[str, ...] = ()
    avoid: tuple[str, ...] = ()
    members: int = 1
    most: int = 0
    speeds: tuple[Speed, ...] = ()
    device_mb: int = 0
    within: Literal["", "node", "link"] = ""
    done: float = 0.0  # this and the next as in `PendingJob`
    remaining: float = 0.0  # progress left
    estimate_s: float = 0.0  # left, from now on; see `ends`
    deadline: float = 0.0
    preemptible: bool = False
    restart_s: float = 0.0
    served_s: float = 0.0
    preemptions: int = 0
    model: str = ""
    checkpointed: float = 0.0  # when its last checkpoint was made; 0 for none
    movable: bool = True  # whether preempt, migrate and resize can be carried out on it now
    ends: float = 0.0  # when it will end, if that is known; 0 for not known
    leaving: bool = False  # it was told to stop: what it holds will be free soon


class Tenant(Struct, frozen=True, gc=False):
    """A tenant's quota, as a ClusterQueue of Kueue. `None` is no limit."""

    name: str
    weight: float = 1.0  # share of what is borrowed, among the tenants of a cohort
    nominal: Resources | None = None  # its own; beyond that it borrows what others of its cohort don't use
    borrowing: Resources | None = None  # most it borrows
    lending: Resources | None = None  # most it lends
    cohort: str = ""  # tenants of one name lend to each other; "" for none: it holds `nominal` at most


class ModelState(Struct, frozen=True, gc=False):
    """A served model and its load."""

    name: str
    tenant: str = "default"
    request: Resources = Resources()  # of one replica
    plugins: tuple[str, ...] = ()  # any of these can serve it
    artifact: str = ""  # digest
    replicas: int = 0  # running or starting: `allocation`
    allocation: tuple[Share, ...] = ()
    minimum: int = 0
    maximum: int = 1
    arrivals_per_s: float = 0.0
    queue: int = 0  # calls that wait now
    rate_per_s: float = 0.0  # calls that one replica answers; 0 for not known
    slots: int = 1  # calls that one replica works on at a time
    latency_ms: float = 0.0  # p99 lately
    objective_ms: float = 0.0  # p99 wanted; 0 for none
    idle_s: float = 0.0  # since the last call
    start_s: float = 0.0  # until a new replica answers
    scaled: float = 0.0  # when its number of replicas changed last
    priority: int = 0
    type: str = ""  # of the devices
    zero_after_s: float = 0.0  # without a call for so long it goes to zero, where `minimum` is; 0 for as the scheduler is set


class ClusterState(Struct, frozen=True, gc=False):
    version: int  # grows with every change; a decision names the version it was made on
    now: float
    nodes: tuple[NodeState, ...]
    pending: tuple[PendingJob, ...]
    placed: tuple[PlacedJob, ...] = ()
    quotas: dict[str, Resources] = {}  # tenant -> most it may hold; a tenant without an entry has no limit
    tenants: tuple[Tenant, ...] = ()  # further limits
    models: tuple[ModelState, ...] = ()
    actions: tuple[Action, ...] = ()  # what can be carried out beside place, wait and reject
    source: str = ""  # who numbers the versions; deltas are of the same source


class ClusterDelta(Struct, frozen=True, gc=False):
    """What a state has that the one of version `base` has not. A job is pending or placed: the newest entry counts."""

    source: str
    base: int  # 0 for nothing: the first part of a snapshot that is too large for one message
    version: int
    now: float
    nodes: tuple[NodeState, ...] = ()  # new or changed
    pending: tuple[PendingJob, ...] = ()
    placed: tuple[PlacedJob, ...] = ()
    models: tuple[ModelState, ...] = ()
    quotas: dict[str, Resources] | None = None  # all; None for as before
    tenants: tuple[Tenant, ...] | None = None
    actions: tuple[Action, ...] | None = None
    gone: tuple[str, ...] = ()  # jobs that are not there any more
    gone_nodes: tuple[str, ...] = ()
    gone_models: tuple[str, ...] = ()
    more: bool = False  # another part follows: no decisions yet


class Decision(Struct, frozen=True, gc=False):
    job: str  # for "scale" a model's name, and for the "wait" of one that has fewer replicas than its minimum
    action: Action
    node: str = ""  # of the first member
    plugin: str = ""
    reason: str = ""  # for people: why here, or what it waits for
    score: float = 0.0  # by which it was preferred, in the policy's own measure; for people
    allocation: tuple[Share, ...] = ()  # place, migrate, resize, scale: all of it, not the change; () for one member on `node`
    starts: float = 0.0  # wait: when it will start, by the estimates that there are; 0 for not known
    remedy: str = ""  # wait: what would start it


class Decisions(Struct, frozen=True, gc=False):
    version: int  # of the state that was decided on
    decisions: tuple[Decision, ...]


class Scheduler(Contract, name="scheduler", major=1):
    """Decides, and has no effects: the same state gives the same decisions."""

    @unary
    async def decide(self, request: ClusterState, call: Any) -> Decisions:
        """One decision for every pending job: placed, waiting (with the reason) or rejected for good; and what is to be done with
        placed jobs (preempt, migrate, resize) and models (scale). They are carried out in their order: what one of them frees
        is there for those behind it."""
        ...

    @unary
    async def update(self, request: ClusterDelta, call: Any) -> Decisions:
        """As `decide` on the state that `request` leads to, without the waits that are as in the last answer. ClientFault
        "need_snapshot" where the base is not known here: send a snapshot. A scheduler that keeps no state inherits this."""
        raise ClientFault("need_snapshot", f"this scheduler does not know version {request.base}", "send a snapshot")
