"""The scheduling policy: a pure function from a `ClusterState` and `Settings` to one decision for every pending job.

Jobs are taken in the order of their priority, aged by their wait (`order`). For each: filter the nodes that can run it
now, score those that are left, place it on the best, and go on with what remains. Two things keep jobs from starving:
aging (a job that waits overtakes younger ones of higher priority) and reservations (what an old job waits for is
withheld from those behind it; without that, small jobs would slip past a large one for ever).
Terms after the Kubernetes scheduling framework (filter, score) and Slurm's multifactor priority (age).
"""

from collections.abc import Iterable

from msgspec import Struct

from kernelm_contracts.scheduler import ClusterState, Decision, Decisions, NodeState, PendingJob
from kernelm_scheduler.settings import Settings
from kernelm_sdk.system import Resources

CPU_TOLERANCE = 1e-6  # cores; sums of decimal fractions are not exact
NODES_SHOWN = 3  # in the reason of a job that waits


class Room:
    """What is left while a round goes on: of every node, of its plugins' slots, of every tenant's quota."""

    def __init__(self, state: ClusterState) -> None:
        self.free = {node.name: node.free for node in state.nodes}
        self.slots = {node.name: dict(node.plugins) for node in state.nodes}
        self.quotas = dict(state.quotas)
        self.jobs: dict[str, dict[str, int]] = {}  # tenant -> node -> jobs there
        for job in state.placed:
            self._count(job.tenant, job.node)
            if job.tenant in self.quotas:
                self.quotas[job.tenant] = minus(self.quotas[job.tenant], job.request)

    def place(self, job: PendingJob, node: str, plugin: str) -> None:
        """Take what `job` asks for."""
        self.slots[node][plugin] -= 1
        self._count(job.tenant, node)
        self.reserve(job, node)
        self.reserve_quota(job)

    def reserve(self, job: PendingJob, node: str) -> None:
        """Withhold from later jobs what `job` waits for on `node`; what is left may be negative, which fits nobody."""
        self.free[node] = minus(self.free[node], job.request)

    def reserve_quota(self, job: PendingJob) -> None:
        if job.tenant in self.quotas:
            self.quotas[job.tenant] = minus(self.quotas[job.tenant], job.request)

    def _count(self, tenant: str, node: str) -> None:
        nodes = self.jobs.setdefault(tenant, {})
        nodes[node] = nodes.get(node, 0) + 1


class Score(Struct, frozen=True):
    """The terms of a node's score, each between 0 and 1, and their weighted mean."""

    packing: float
    locality: float
    spread: float
    total: float


def decide(state: ClusterState, settings: Settings) -> Decisions:
    """One decision for every pending job, in the order in which they were taken."""
    room = Room(state)
    return Decisions(state.version, tuple(_decide(job, state, room, settings) for job in order(state, settings)))


def order(state: ClusterState, settings: Settings) -> list[PendingJob]:
    """Highest aged priority first. The wait is added to the priority in units of `aging_s`, so a newcomer overtakes only
    those that have waited less than its lead in priority is worth, and nobody is overtaken for ever."""

    def rank(job: PendingJob) -> tuple[float, float, str]:
        return (-(job.priority + _waited(job, state) / settings.aging_s), job.submitted, job.id)

    return sorted(state.pending, key=rank)


def _waited(job: PendingJob, state: ClusterState) -> float:
    return max(0.0, state.now - job.submitted)


def _decide(job: PendingJob, state: ClusterState, room: Room, settings: Settings) -> Decision:
    if never := impossible(job, state):
        return Decision(job.id, "reject", reason=never)
    if not state.nodes:
        return Decision(job.id, "wait", reason="waits: no node has reported")
    old = _waited(job, state) >= settings.reserve_after_s
    left = room.quotas.get(job.tenant)
    if left is not None and (short := shortage(job.request, left, f"the quota of tenant {job.tenant}")):
        if old:
            room.reserve_quota(job)
        return Decision(job.id, "wait", reason=f"waits: {short} left")
    candidates = candidates_for(job, state)
    obstacles = [obstacle(job, node, room) for node in candidates]
    fitting = [node for node, why in zip(candidates, obstacles, strict=True) if not why]
    if not fitting:
        if old:
            room.reserve(job, _soonest(job, candidates, room).name)
        return Decision(job.id, "wait", reason="waits: " + _listed(obstacles))
    scores = {node.name: score(job, node, room, settings) for node in fitting}
    name = min(scores, key=lambda n: (-scores[n].total, n))
    plugin = next(p for p in job.plugins if room.slots[name].get(p, 0) > 0)
    best = scores[name]
    reason = (f"{plugin} on {name}, which has {amount(room.free[name])} free; packing {best.packing:.2f}, "
              f"locality {best.locality:.2f}, spread {best.spread:.2f}")  # fmt: skip
    room.place(job, name, plugin)
    return Decision(job.id, "place", name, plugin, reason, round(best.total, 4))


# ---- filter ------------------------------------------------------------------------------------------------------


def impossible(job: PendingJob, state: ClusterState) -> str:
    """Why the job can never run on these nodes under this quota, however long it waits; "" if it may."""
    request = job.request
    if request.cpu < 0 or request.memory_mb < 0 or request.gpus < 0:
        return f"asks for a negative amount: {amount(request)}, {request.gpus} GPUs"
    if (quota := state.quotas.get(job.tenant)) and (short := shortage(request, quota, f"the quota of tenant {job.tenant}")):
        return f"can never run: {short} in all"
    obstacles = [f"{short} in all" for n in state.nodes if (short := shortage(request, n.capacity, f"node {n.name}"))]
    if state.nodes and len(obstacles) == len(state.nodes):
        return "can never run: " + _listed(obstacles)
    return ""


def candidates_for(job: PendingJob, state: ClusterState) -> list[NodeState]:
    """Nodes whose capacity suffices, by name; without those to avoid, unless no others are left: then a node on which the
    job has failed is better than none."""
    able = sorted((n for n in state.nodes if not shortage(job.request, n.capacity)), key=lambda n: n.name)
    return [n for n in able if n.name not in job.avoid and set(job.plugins) & set(n.plugins)] or able


def obstacle(job: PendingJob, node: NodeState, room: Room) -> str:
    """Why the job can't start on `node` now; "" if it can."""
    if not any(plugin in node.plugins for plugin in job.plugins):
        return f"no plugin of {' or '.join(job.plugins) or 'any name'} is ready on node {node.name}"
    if not any(room.slots[node.name].get(plugin, 0) > 0 for plugin in job.plugins):
        return f"every instance of {' or '.join(job.plugins)} on node {node.name} is at work"
    short = shortage(job.request, room.free[node.name], f"node {node.name}")
    return f"{short} free" if short else ""


def _soonest(job: PendingJob, candidates: list[NodeState], room: Room) -> NodeState:
    """The node that lacks the least for the job, as a share of its capacity: where it is likely to start first."""

    def lack(node: NodeState) -> tuple[float, str]:
        left, capacity = minus(room.free[node.name], job.request), node.capacity
        missing = [max(0.0, -have) / of for have, of in zip(_dimensions(left), _dimensions(capacity), strict=True) if of > 0]
        return sum(missing), node.name

    return min(candidates, key=lack)


# ---- score -------------------------------------------------------------------------------------------------------


def score(job: PendingJob, node: NodeState, room: Room, settings: Settings) -> Score:
    """How good `node` is for `job`, among nodes on which it fits."""
    left = _dimensions(minus(room.free[node.name], job.request))
    unused = [have / of for have, of in zip(left, _dimensions(node.capacity), strict=True) if of > 0]
    packing = 1.0 - sum(unused) / len(unused) if unused else 1.0
    locality = len(set(job.artifacts) & set(node.artifacts)) / len(set(job.artifacts)) if job.artifacts else 0.0
    jobs = room.jobs.get(job.tenant, {})
    spread = 1.0 - jobs.get(node.name, 0) / sum(jobs.values()) if jobs else 1.0
    weights = settings.weights
    weighted = weights.packing * packing + weights.locality * locality + weights.spread * spread
    weight = weights.packing + weights.locality + weights.spread
    return Score(packing, locality, spread, weighted / weight if weight else 0.0)


# ---- resources ---------------------------------------------------------------------------------------------------


def minus(a: Resources, b: Resources) -> Resources:
    return Resources(a.cpu - b.cpu, a.memory_mb - b.memory_mb, a.gpus - b.gpus)


def shortage(request: Resources, room: Resources, whose: str = "") -> str:
    """The first thing that is too little, as "needs 2 cores, node local has 0.9"; "" if the request fits."""
    if request.cpu > room.cpu + CPU_TOLERANCE:
        return f"needs {_cores(request.cpu)}, {whose} has {max(room.cpu, 0.0):.3g}"
    if request.memory_mb > room.memory_mb:
        return f"needs {request.memory_mb} MiB, {whose} has {max(room.memory_mb, 0)}"
    if request.gpus > room.gpus:
        return f"needs {request.gpus} GPUs, {whose} has {max(room.gpus, 0)}"
    return ""


def amount(resources: Resources) -> str:
    """For people: "1.5 cores and 2048 MiB"."""
    return f"{_cores(resources.cpu)} and {resources.memory_mb} MiB"


def _cores(cpu: float) -> str:
    return f"{cpu:.3g} core{'' if cpu == 1 else 's'}"


def _dimensions(resources: Resources) -> tuple[float, float, float]:
    return resources.cpu, float(resources.memory_mb), float(resources.gpus)


def _listed(reasons: Iterable[str]) -> str:
    shown = list(reasons)
    more = len(shown) - NODES_SHOWN
    return "; ".join(shown[:NODES_SHOWN]) + (f"; and {more} more nodes" if more > 0 else "")
