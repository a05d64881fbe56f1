"""A scheduling round as pure functions: the state that the scheduler sees, and the check of what it decided.

The scheduler is a plugin and may be wrong: nothing that it says is carried out before it was checked here.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence

from msgspec import Struct, structs

from kernelm_contracts.jobs import Deployment, JobRecord, JobSpec
from kernelm_contracts.scheduler import Action, ClusterState, Decision, ModelState, NodeState, PendingJob, PlacedJob, Share, Tenant
from kernelm_jobs.deployment import instances_for, is_replica, request_of
from kernelm_jobs.elastic import WIDE, WIDTH, fraction, is_elastic, terms
from kernelm_jobs.holdings import Held, instances_of, shares_of, size
from kernelm_jobs.runs import digests_in
from kernelm_jobs.states import HOLDING
from kernelm_sdk.system import Instance, NodeReport, Resources, SystemState

CPU_TOLERANCE = 1e-6  # cores; sums of decimal fractions are not exact
# what the job table can carry out beside place, wait and reject
ACTIONS: tuple[Action, ...] = ("preempt", "migrate", "resize", "scale")
POOL = "pool:"  # before the name of a plugin: a replica needs no slot of an instance, it brings a pool of its own
RESTART_S = 10.0  # to stop at a checkpoint and be at work again, as reckoned with
SERVED_STEP_S = 30.0  # in which attained service grows, so that a round is not about every running job
MODEL = "model:"  # before the name of a deployment: its further replicas, which go where it has some, or anywhere


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
    at_work = Counter(i for job in jobs if job.state in HOLDING for i in {*instances_of(job), job.heir or job.instance})
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


def pending_job(job: JobRecord, system: SystemState, installed: Mapping[str, tuple[str, ...]],
                deployments: Mapping[str, Deployment] | None = None) -> PendingJob:  # fmt: skip
    """A queued job as the scheduler sees it."""
    spec, members = job.spec, 1
    if is_replica(job):
        request = request_of(job)
        plugins: tuple[str, ...] = (POOL + request.plugin,)
        members = instances_for(request, (deployments or {}).get(request.name))
    else:
        contract = spec.uses.rpartition(".")[0]
        plugins = plugins_for(contract, spec.plugin, system, installed) or (contract,)
        plugins, members = tuple(WIDE + p for p in plugins) if is_elastic(job) else plugins, spec.gang
    return PendingJob(job.id, spec.name, spec.resources, plugins, spec.priority, spec.tenant, job.submitted, job.attempt,
                      tuple(sorted(set(digests_in(spec.request)))), (job.node,) if job.node else (), members,
                      within="node" if is_elastic(job) or (is_replica(job) and members > 1) else "", started=job.started,
                      restart_s=RESTART_S, estimate_s=_left(job), deadline=spec.deadline, preemptible=spec.preemptible,
                      served_s=job.served_s, preemptions=job.preemptions,
                      model=request_of(job).name if is_replica(job) else "", **terms(job))  # fmt: skip


def _left(job: JobRecord) -> float:
    """Run time left, by the estimate of who submitted it and its last progress."""
    return job.spec.estimate_s * (1.0 - fraction(job))


def placed_job(held: Held, ready: Mapping[str, Worker], now: float) -> PlacedJob:
    """A placed or running job as the scheduler sees it."""
    job = held.job
    spec, worker = job.spec, ready.get(job.instance)
    began = job.started if job.state == "running" else now  # else it is of an earlier allocation
    ends = began + spec.estimate_s if spec.estimate_s else 0.0
    served_s = job.served_s + size(held.shares) * ((now - began) // SERVED_STEP_S * SERVED_STEP_S)
    return PlacedJob(job.id, job.node, spec.resources, spec.priority, spec.tenant, began,
                     () if held.shares == (Share(job.node),) else held.shares, spec.name,
                     members=1 if is_elastic(job) else size(held.shares), restart_s=RESTART_S,
                     plugins=(WIDE * is_elastic(job) + worker.plugin,) if worker else (), submitted=job.submitted,
                     attempt=job.attempt,
                     deadline=spec.deadline, preemptible=spec.preemptible, served_s=served_s, preemptions=job.preemptions,
                     checkpointed=job.checkpointed, ends=ends,
                     movable=job.state == "running" and not is_replica(job) and not job.target,
                     leaving=job.stopping > 0 and not job.target,
                     model=request_of(job).name if is_replica(job) else "", **terms(job))  # fmt: skip


def cluster_state(version: int, now: float, held: Sequence[Held], pending: Sequence[PendingJob], reports: Sequence[NodeReport],
                  ready: Sequence[Worker], quotas: Mapping[str, Resources], tenants: tuple[Tenant, ...] = (),
                  source: str = "", models: Sequence[ModelState] = (),
                  loaded: Mapping[str, tuple[str, ...]] | None = None) -> ClusterState:  # fmt: skip
    """What the scheduler decides on: capacity as the nodes report it, less what jobs and deployments hold by our own account.
    Of what lies on the nodes it is told what somebody could ask for. `loaded`: node -> models that are loaded there."""
    asked = {digest for job in pending for digest in job.artifacts} | {model.artifact for model in models}
    wide = {plugin for job in pending for plugin in job.plugins if plugin.startswith(WIDE)}
    servers = {each.model: request_of(each.job).plugin for each in held if each.model}
    known = {worker.instance: worker for worker in ready}
    nodes = []
    for report in sorted(reports, key=lambda r: r.node):
        slots: Counter[str] = Counter()
        for worker in ready:
            if worker.node == report.node:
                slots[worker.plugin] += worker.free
        slots.update({WIDE + plugin: WIDTH * count for plugin, count in slots.items() if WIDE + plugin in wide})
        for each in held:
            if is_elastic(each.job) and each.job.node == report.node and (worker := known.get(each.job.instance)):
                slots[WIDE + worker.plugin] += WIDTH - size(each.shares)
        for job in pending:
            slots.update({p: job.members for p in job.plugins if p.startswith(POOL) and p.removeprefix(POOL) in report.plugins})
        for model in models:
            at = {share.node for share in model.allocation}
            if report.node in at or (not at and servers[model.name] in report.plugins):
                slots[MODEL + model.name] = max(model.maximum - model.replicas, 0)
        free = left(report.capacity, [each.on(report.node) for each in held])
        nodes.append(NodeState(report.node, report.capacity, free, dict(slots), tuple(sorted(asked.intersection(report.artifacts))),
                               models=tuple(sorted(asked.intersection((loaded or {}).get(report.node, ()))))))  # fmt: skip
    placed = tuple(placed_job(each, known, now) for each in held if not each.model)
    return ClusterState(version, now, tuple(nodes), tuple(pending), placed, dict(quotas), tenants, tuple(models), ACTIONS, source)


def loaded_models(system: SystemState) -> dict[str, tuple[str, ...]]:
    """Node -> digests of the models that ready instances there have loaded."""
    served = {pool.pool: pool.settings["model"].get("artifact", "") for pool in system.pools
              if not pool.contracts and isinstance(pool.settings.get("model"), dict)}  # fmt: skip
    found: dict[str, set[str]] = {}
    for i in system.instances:
        if i.state == "ready" and served.get(i.pool):
            found.setdefault(i.node, set()).add(served[i.pool])
    return {node: tuple(sorted(digests)) for node, digests in found.items()}


def left(capacity: Resources, requests: Iterable[Resources]) -> Resources:
    """`capacity` less all `requests`."""
    for r in requests:
        capacity = Resources(capacity.cpu - r.cpu, capacity.memory_mb - r.memory_mb, capacity.gpus - r.gpus)
    return capacity


def fits(request: Resources, room: Resources) -> bool:
    return request.cpu <= room.cpu + CPU_TOLERANCE and request.memory_mb <= room.memory_mb and request.gpus <= room.gpus


def choose(decision: Decision, contract: str, ready: Sequence[Worker]) -> Worker | None:
    """The instance for a placed job: of the decided plugin on the decided node, the one with the most room."""
    plugin = decision.plugin.removeprefix(WIDE)
    able = [w for w in ready if (w.node, w.plugin) == (decision.node, plugin) and contract in w.contracts and w.free > 0]
    return min(able, key=lambda w: (-w.free, w.instance), default=None)


def choose_all(decision: Decision, spec: JobSpec, ready: Sequence[Worker]) -> list[Worker]:
    """The instances for a placed job, each another one: as many as its gang has, where the decision puts them; [] if they are not
    there."""
    found: list[Worker] = []
    shares = decision.allocation if spec.gang > 1 else (Share(decision.node),)
    for node in (share.node for share in shares for _ in range(share.members)):
        left = [w for w in ready if all(w.instance != f.instance for f in found)]
        worker = choose(structs.replace(decision, node=node), spec.uses.rpartition(".")[0], left)
        if worker is None:
            return []
        found.append(worker)
    return found


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
        if fits(job.spec.resources, left(node.capacity, [Held(a, shares_of(a)).on(node.name) for a in above])):
            return ""
    held = ", ".join(f"{a.spec.name} holds {_amount(a.spec.resources)}" for a in above)
    return f"can never run: needs {_amount(job.spec.resources)} beside the jobs that wait for it: {held}"


def _amount(r: Resources) -> str:
    return f"{r.cpu:g} cores, {r.memory_mb} MiB, {r.gpus} GPUs"
