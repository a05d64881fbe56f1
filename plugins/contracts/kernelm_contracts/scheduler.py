"""`scheduler/1`: who runs where, as a pure function of the state of the cluster.

Units: `cpu` in cores, `_mb` in 2**20 bytes, times in Unix seconds. The job table checks every decision.
"""

from typing import Any, Literal

from msgspec import Struct

from kernelm_sdk.contract import Contract, unary
from kernelm_sdk.system import Resources


class NodeState(Struct, frozen=True):
    name: str
    capacity: Resources
    free: Resources  # capacity less what the placed and running jobs have requested
    plugins: dict[str, int] = {}  # plugin -> how many more jobs its instances here can take
    artifacts: tuple[str, ...] = ()  # digests in its cache


class PendingJob(Struct, frozen=True):
    id: str
    name: str
    request: Resources
    plugins: tuple[str, ...]  # any of these can do it
    priority: int = 0  # higher first
    tenant: str = "default"
    submitted: float = 0.0
    attempt: int = 0
    artifacts: tuple[str, ...] = ()  # what it will read
    avoid: tuple[str, ...] = ()  # nodes on which it has failed


class PlacedJob(Struct, frozen=True):
    id: str
    node: str
    request: Resources
    priority: int = 0
    tenant: str = "default"
    started: float = 0.0


class ClusterState(Struct, frozen=True):
    version: int  # grows with every change; a decision names the version it was made on
    now: float
    nodes: tuple[NodeState, ...]
    pending: tuple[PendingJob, ...]
    placed: tuple[PlacedJob, ...] = ()
    quotas: dict[str, Resources] = {}  # tenant -> most it may hold; a tenant without an entry has no limit


class Decision(Struct, frozen=True):
    job: str
    action: Literal["place", "wait", "reject"]
    node: str = ""
    plugin: str = ""
    reason: str = ""  # for people: why here, or what it waits for
    score: float = 0.0


class Decisions(Struct, frozen=True):
    version: int  # of the state that was decided on
    decisions: tuple[Decision, ...]


class Scheduler(Contract, name="scheduler", major=1):
    """Decides, and has no effects: the same state gives the same decisions."""

    @unary
    async def decide(self, request: ClusterState, call: Any) -> Decisions:
        """One decision for every pending job: placed, waiting (with the reason) or rejected for good."""
        ...
