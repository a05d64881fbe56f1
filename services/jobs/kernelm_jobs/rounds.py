"""A scheduling round as pure functions: the state that the scheduler sees, and the check of what it decided.

The scheduler is a plugin and may be wrong: nothing that it says is carried out before it was checked here.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence

from msgspec import Struct, structs

from kernelm_contracts.jobs import JobRecord
from kernelm_contracts.scheduler import Action, ClusterState, Decision, NodeState, PendingJob, PlacedJob, Tenant
from kernelm_jobs.deployment import is_replica, request_of
from kernelm_jobs.runs import digests_in
from kernelm_jobs.states import HOLDING
from kernelm_sdk.system import Instance, NodeReport, Resources, SystemState

CPU_TOLERANCE = 1e-6  # cores; sums of decimal fractions are not exact
ACTIONS: tuple[Action, ...] = ("preempt",)  # what the job table can carry out beside place, wait and reject
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
                      tuple(sorted(set(digests_in(spec.request)))), (job.node,) if job.node else (), started=job.started,
                      estimate_s=_left(job), deadline=spec.deadline, preemptible=spec.preemptible, preemptions=job.preemptions,
                      model=request_of(job).name if is_replica(job) else "")  # fmt: skip


def _left(job: JobRecord) -> float:
    """Run time left, by the estimate of who submitted it and its last progress."""
    return job.spec.estimate_s * (1.0 - min(max(job.progress.fraction, 0.0), 1.0))


def placed_job(job: JobRecord, ready: Mapping[str, Worker]) -> PlacedJob:
    """A placed or running job as the scheduler sees it."""
    spec, worker = job.spec, ready.get(job.instance)
    began = job.started or job.heard
    ends = began + spec.estimate_s if spec.estimate_s and began else 0.0
    return PlacedJob(job.id, job.node, spec.resources, spec.priority, spec.tenant, began, name=spec.name,
                     plugins=(worker.plugin,) if worker else (), submitted=job.submitted, attempt=job.attempt,
                     deadline=spec.deadline, preemptible=spec.preemptible, preemptions=job.preemptions,
                     checkpointed=job.checkpointed, movable=not is_replica(job), ends=ends, leaving=job.stopping > 0,
                     model=request_of(job).name if is_replica(job) else "")  # fmt: skip


def cluster_state(version: int, now: float, jobs: Sequence[JobRecord], pending: Sequence[PendingJob], reports: Sequence[NodeReport],
                  ready: Sequence[Worker], quotas: Mapping[str, Resources], tenants: tuple[Tenant, ...] = (),
                  source: str = "") -> ClusterState:  # fmt: skip
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
    known = {worker.instance: worker for worker in ready}
    placed = tuple(placed_job(job, known) for job in holding)
    return ClusterState(version, now, tuple(nodes), tuple(pending), placed, dict(quotas), tenants, (), ACTIONS, source)


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
