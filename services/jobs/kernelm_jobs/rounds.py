"""A scheduling round as pure functions: the state that the scheduler sees, and the check of what it decided.

The scheduler is a plugin and may be wrong: nothing that it says is carried out before it was checked here.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence

from msgspec import Struct, structs

from kernelm_contracts.jobs import JobRecord
from kernelm_contracts.scheduler import ClusterState, Decision, Decisions, NodeState, PendingJob, PlacedJob
from kernelm_jobs.deployment import is_replica, request_of
from kernelm_jobs.runs import digests_in
from kernelm_jobs.states import HOLDING
from kernelm_sdk.system import Instance, NodeReport, Resources, SystemState

CPU_TOLERANCE = 1e-6  # cores; sums of decimal fractions are not exact
POOL = "pool:"  # before the name of a plugin: a replica needs no slot of an instance, it brings a pool of its own


class Worker(Struct, frozen=True):
    """A ready instance that takes jobs, and how many more."""

    instance: str
    node: str
    plugin: str
    version: str
    contracts: tuple[str, ...]
    free: int


def workers(system: SystemState, jobs: Iterable[JobRecord], max_jobs: Mapping[str, int],
            condemned: Collection[str] = ()) -> list[Worker]:  # fmt: skip
    """The ready instances, by id, without those that are about to be stopped (`condemned`), and without those of a pool that
    has not proven itself yet. Those of a model's pool are left out too: they serve, and jobs would slow them down."""
    at_work = Counter(job.instance for job in jobs if job.state in HOLDING)
    others = {pool.pool for pool in system.pools if not pool.contracts} | {s.pool for s in system.swaps if s.phase == "starting"}
    return [Worker(i.id, i.node, i.plugin, i.version, i.contracts, max(max_jobs.get(i.plugin, 1) - at_work[i.id], 0))
            for i in sorted(system.instances, key=lambda i: i.id)
            if i.state == "ready" and i.node and i.pool not in others and i.id not in condemned]  # fmt: skip


def plugins_for(contract: str, wanted: str, system: SystemState, installed: Mapping[str, tuple[str, ...]]) -> tuple[str, ...]:
    """Plugins that may do a job of `contract`: the one that the user wants, else the one that the contract is routed to,
    else any that is ready, else any that is installed (`installed`: plugin -> contracts)."""
    if wanted:
        return (wanted,)
    pools = {d.pool for r in system.routes if r.kind == "svc" and r.name == contract for d in r.to}
    routed = {p.plugin for p in system.pools if p.pool in pools} | {i.plugin for i in system.instances if i.pool in pools}
    ready = {i.plugin for i in system.instances if i.state == "ready" and contract in i.contracts}
    return tuple(sorted(routed or ready or {name for name, contracts in installed.items() if contract in contracts}))


def version_of(plugin: str, system: SystemState) -> str:
    """Version of the plugin that runs, the newest instance's; "" if none does."""
    found = [i for i in system.instances if i.plugin == plugin and i.state == "ready"]
    return max(found, key=_since).version if found else ""


def _since(instance: Instance) -> float:
    return instance.since


def pending_job(job: JobRecord, system: SystemState, installed: Mapping[str, tuple[str, ...]]) -> PendingJob:
    """A queued job as the scheduler sees it."""
    spec = job.spec
    if is_replica(job):
        plugins: tuple[str, ...] = (POOL + request_of(job).plugin,)
    else:
        contract = spec.uses.rpartition(".")[0]
        plugins = plugins_for(contract, spec.plugin, system, installed) or (contract,)
    return PendingJob(job.id, spec.name, spec.resources, plugins, spec.priority, spec.tenant, job.submitted, job.attempt,
                      tuple(sorted(set(digests_in(spec.request)))), (job.node,) if job.node else ())  # fmt: skip


def cluster_state(version: int, now: float, jobs: Sequence[JobRecord], pending: Sequence[PendingJob], reports: Sequence[NodeReport],
                  ready: Sequence[Worker], quotas: Mapping[str, Resources]) -> ClusterState:  # fmt: skip
    """What the scheduler decides on: capacity as the nodes report it, less what jobs hold by our own account."""
    holding = [job for job in jobs if job.state in HOLDING]
    pools = Counter(plugin for job in pending for plugin in job.plugins if plugin.startswith(POOL))
    nodes = []
    for report in sorted(reports, key=lambda r: r.node):
        slots: Counter[str] = Counter()
        for worker in ready:
            if worker.node == report.node:
                slots[worker.plugin] += worker.free
        slots.update({plugin: count for plugin, count in pools.items() if plugin.removeprefix(POOL) in report.plugins})
        free = left(report.capacity, [job.spec.resources for job in holding if job.node == report.node])
        nodes.append(NodeState(report.node, report.capacity, free, dict(slots)))
    placed = tuple(PlacedJob(j.id, j.node, j.spec.resources, j.spec.priority, j.spec.tenant, j.started) for j in holding)
    return ClusterState(version, now, tuple(nodes), tuple(pending), placed, dict(quotas))


# ---- the check ---------------------------------------------------------------------------------------------------


class Checked(Struct):
    """What may be carried out, and what not: job -> complaint."""

    accepted: list[Decision]
    refused: dict[str, str]


def check(state: ClusterState, answer: Decisions) -> Checked:
    """Check every decision against the state that it was made on, each after those before it were carried out."""
    checked = Checked([], {})
    if answer.version != state.version:
        checked.refused = {j.id: f"the scheduler decided on version {answer.version}, not {state.version}" for j in state.pending}
        return checked
    room = _Room(state)
    for decision in answer.decisions:
        if complaint := room.complaint(decision):
            checked.refused[decision.job] = complaint
        else:
            room.take(decision)
            checked.accepted.append(decision)
    decided = {d.job for d in answer.decisions}
    checked.refused |= {j.id: "the scheduler gave no decision" for j in state.pending if j.id not in decided}
    return checked


class _Room:
    """What is left of nodes, slots and quotas while decisions are checked one after the other."""

    def __init__(self, state: ClusterState) -> None:
        self.pending = {job.id: job for job in state.pending}
        self.free = {node.name: node.free for node in state.nodes}
        self.slots = {node.name: dict(node.plugins) for node in state.nodes}
        self.quotas = {tenant: left(quota, [p.request for p in state.placed if p.tenant == tenant])
                       for tenant, quota in state.quotas.items()}  # fmt: skip
        self.taken: set[str] = set()

    def complaint(self, d: Decision) -> str:
        """What is wrong with the decision; "" if nothing is."""
        job = self.pending.get(d.job)
        if job is None:
            return "the scheduler decided on a job that does not wait"
        if d.job in self.taken:
            return "the scheduler decided on it twice"
        if d.action != "place":
            return "" if d.reason else f"the scheduler gave no reason to {d.action}"
        if d.node not in self.free:
            return f"the scheduler placed it on {d.node!r}, which is no node"
        if d.plugin not in job.plugins:
            return f"the scheduler gave it to plugin {d.plugin!r}, which can't do it"
        if self.slots[d.node].get(d.plugin, 0) < 1:
            return f"the scheduler gave it to {d.plugin} on {d.node}, which has no free slot"
        if not fits(job.request, self.free[d.node]):
            return f"the scheduler oversubscribed node {d.node}: {job.request} of {self.free[d.node]}"
        if job.tenant in self.quotas and not fits(job.request, self.quotas[job.tenant]):
            return f"the scheduler broke the quota of tenant {job.tenant}: {job.request} of {self.quotas[job.tenant]}"
        return ""

    def take(self, d: Decision) -> None:
        job = self.pending[d.job]
        self.taken.add(d.job)
        if d.action != "place":
            return
        self.slots[d.node][d.plugin] -= 1
        self.free[d.node] = left(self.free[d.node], [job.request])
        if job.tenant in self.quotas:
            self.quotas[job.tenant] = left(self.quotas[job.tenant], [job.request])


def left(capacity: Resources, requests: Iterable[Resources]) -> Resources:
    """`capacity` less all `requests`."""
    for r in requests:
        capacity = Resources(capacity.cpu - r.cpu, capacity.memory_mb - r.memory_mb, capacity.gpus - r.gpus)
    return capacity


def fits(request: Resources, room: Resources) -> bool:
    return request.cpu <= room.cpu + CPU_TOLERANCE and request.memory_mb <= room.memory_mb and request.gpus <= room.gpus


def choose(decision: Decision, contract: str, ready: Sequence[Worker]) -> Worker | None:
    """The instance for a placed job: of the decided plugin on the decided node, the one with the most room."""
    able = [w for w in ready if (w.node, w.plugin) == (decision.node, decision.plugin) and contract in w.contracts and w.free > 0]
    return min(able, key=lambda w: (-w.free, w.instance), default=None)


def took(ready: Sequence[Worker], instance: str) -> list[Worker]:
    """The workers after one more job went to `instance`."""
    return [structs.replace(w, free=w.free - 1) if w.instance == instance else w for w in ready]


def ancestors(job: JobRecord, jobs: Mapping[str, JobRecord]) -> list[JobRecord]:
    """The jobs that wait for this one: its parent, and so on."""
    found: list[JobRecord] = []
    parent = jobs.get(job.spec.parent)
    while parent is not None and parent not in found:
        found.append(parent)
        parent = jobs.get(parent.spec.parent)
    return found


def deadlock(job: JobRecord, jobs: Mapping[str, JobRecord], nodes: Sequence[NodeState]) -> str:
    """Why the job can never start while those that wait for it hold what they hold; "" if it can."""
    above = [a for a in ancestors(job, jobs) if a.state in HOLDING]
    if not above or not nodes:
        return ""
    for node in nodes:
        if fits(job.spec.resources, left(node.capacity, [a.spec.resources for a in above if a.node == node.name])):
            return ""
    held = ", ".join(f"{a.spec.name} holds {_amount(a.spec.resources)}" for a in above)
    return f"can never run: needs {_amount(job.spec.resources)} beside the jobs that wait for it: {held}"


def _amount(r: Resources) -> str:
    return f"{r.cpu:g} cores, {r.memory_mb} MiB, {r.gpus} GPUs"
