"""A scheduling round as pure functions: the state that the scheduler sees, and the check of what it decided.

The scheduler is a plugin and may be wrong: nothing that it says is carried out before it was checked here.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Container, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from msgspec import Struct, structs

from kernelm_contracts.deployments import Deployment
from kernelm_contracts.jobs import JobRecord, JobSpec
from kernelm_contracts.scheduler import Action, ClusterState, Decision, ModelState, NodeState, PendingJob, PlacedJob, Share, Tenant
from kernelm_jobs.deployment import instances_for, is_replica, request_of
from kernelm_jobs.elastic import WIDE, WIDTH, fraction, is_elastic, terms
from kernelm_jobs.holdings import Held, instances_of, shares_of, size, spread, times
from kernelm_jobs.runs import digests_in
from kernelm_jobs.states import HOLDING
from kernelm_sdk.system import Instance, NodeReport, Resources, SystemState

T = TypeVar("T")
CPU_TOLERANCE = 1e-6  # cores; sums of decimal fractions are not exact
# what the job table can carry out beside place, wait and reject
ACTIONS: tuple[Action, ...] = ("preempt", "migrate", "resize", "scale")
POOL = "pool:"  # before the name of a plugin: a replica needs no slot of an instance, it brings a pool of its own
RESTART_S = 10.0  # to stop at a checkpoint and be at work again, as reckoned with
SERVED_STEP_S = 30.0  # in which attained service grows, so that a round is not about every running job
MODEL = "model:"  # before the name of a deployment: its further replicas


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


class Shown:
    """What the scheduler was shown of each job last. What has not changed stays the same object, so that a state of ten thousand
    jobs is made, and compared with the one before, by a look at each."""

    def __init__(self) -> None:
        self._last: dict[str, tuple[tuple[Any, ...], Any]] = {}
        self._now: dict[str, tuple[tuple[Any, ...], Any]] = {}

    def again(self) -> None:
        """Another state begins: what was not in the last one is forgotten."""
        self._last, self._now = self._now, {}

    def __call__(self, id: str, about: tuple[Any, ...], make: Callable[[], T]) -> T:
        """What `make` returned last for this job, if that was about the same; else what it returns now."""
        entry = self._last.get(id)
        if entry is None or entry[0] != about:
            entry = about, make()
        self._now[id] = entry
        shown: T = entry[1]
        return shown


def pending_jobs(jobs: Iterable[JobRecord], system: SystemState, installed: Mapping[str, tuple[str, ...]],
                 deployments: Mapping[str, Deployment], shown: Shown) -> list[PendingJob]:  # fmt: skip
    """The queued jobs as the scheduler sees them."""
    found: dict[tuple[str, str], tuple[str, ...]] = {}  # who can do what is the same for all jobs of a kind

    def view(job: JobRecord) -> PendingJob:
        if is_replica(job):
            return pending_job(job, (), deployments)
        kind = job.spec.uses.rpartition(".")[0], job.spec.plugin
        if kind not in found:
            found[kind] = plugins_for(*kind, system, installed)
        return shown(job.id, (job, found[kind]), lambda: pending_job(job, found[kind]))

    return [view(job) for job in jobs]


def pending_job(job: JobRecord, doers: tuple[str, ...], deployments: Mapping[str, Deployment] | None = None) -> PendingJob:
    """A queued job as the scheduler sees it; `doers`: the plugins that may do it (`plugins_for`), unless it is a replica."""
    spec, members = job.spec, 1
    if is_replica(job):
        request = request_of(job)
        plugins: tuple[str, ...] = (POOL + request.plugin,)
        members = instances_for(request, (deployments or {}).get(request.name))
    else:
        doers = doers or (spec.uses.rpartition(".")[0],)
        plugins, members = tuple(WIDE + p for p in doers) if is_elastic(job) else doers, spec.gang
    return PendingJob(job.id, spec.name, spec.resources, plugins, spec.priority, spec.tenant, job.submitted, job.attempt,
                      tuple(sorted(set(digests_in(spec.request)))), (job.node,) if job.node else (), members,
                      within="node" if is_elastic(job) else "", started=job.started,
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


def _shown_placed(held: Held, ready: Mapping[str, Worker], now: float, shown: Shown) -> PlacedJob:
    job, worker = held.job, ready.get(held.job.instance)
    if job.state != "running":  # it is shown to have begun now
        return placed_job(held, ready, now)
    step = (now - job.started) // SERVED_STEP_S
    return shown(job.id, (job, held.shares, worker.plugin if worker else "", step), lambda: placed_job(held, ready, now))


def cluster_state(version: int, now: float, held: Sequence[Held], pending: Sequence[PendingJob], reports: Sequence[NodeReport],
                  ready: Sequence[Worker], quotas: Mapping[str, Resources], tenants: tuple[Tenant, ...] = (),
                  source: str = "", models: Sequence[ModelState] = (),
                  loaded: Mapping[str, tuple[str, ...]] | None = None, shown: Shown | None = None,
                  avoid: Mapping[str, Collection[str]] | None = None) -> ClusterState:  # fmt: skip
    """What the scheduler decides on: capacity as the nodes report it, less what jobs and deployments hold by our own account.
    Of what lies on the nodes it is told what somebody could ask for. `loaded`: node -> models that are loaded there.
    `avoid`: model -> nodes that it is not to be given."""
    asked = {digest for job in pending for digest in job.artifacts} | {model.artifact for model in models}
    wide = {plugin for job in pending for plugin in job.plugins if plugin.startswith(WIDE)}
    servers = {each.model: request_of(each.job).plugin for each in held if each.model}
    known = {worker.instance: worker for worker in ready}
    brought = [(p, job.members) for job in pending for p in job.plugins if p.startswith(POOL)]
    at_work, here = defaultdict[str, list[Worker]](list), defaultdict[str, list[Held]](list)
    for worker in ready:
        at_work[worker.node].append(worker)
    for each in held:
        for node in dict.fromkeys(share.node for share in each.shares):
            here[node].append(each)
    nodes = []
    for report in sorted(reports, key=lambda r: r.node):
        slots: Counter[str] = Counter()
        for worker in at_work[report.node]:
            slots[worker.plugin] += worker.free
        slots.update({WIDE + plugin: WIDTH * count for plugin, count in slots.items() if WIDE + plugin in wide})
        for each in here[report.node]:
            if is_elastic(each.job) and each.job.node == report.node and (mine := known.get(each.job.instance)):
                slots[WIDE + mine.plugin] += WIDTH - size(each.shares)
        for plugin, members in brought:
            slots.update({plugin: members} if plugin.removeprefix(POOL) in report.plugins else {})
        for model in models:
            new = report.node not in (avoid or {}).get(model.name, ()) and servers[model.name] in report.plugins
            if new or any(share.node == report.node for share in model.allocation):
                slots[MODEL + model.name] = max(model.maximum - model.replicas, 0)
        free = left(report.capacity, [each.on(report.node) for each in here[report.node]])
        nodes.append(NodeState(report.node, report.capacity, free, dict(slots), tuple(sorted(asked.intersection(report.artifacts))),
                               models=tuple(sorted(asked.intersection((loaded or {}).get(report.node, ()))))))  # fmt: skip
    placed = tuple(_shown_placed(each, known, now, shown or Shown()) for each in held if not each.model)
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


class Crews:
    """The ready instances by node and plugin, while a round gives them jobs."""

    def __init__(self, ready: Iterable[Worker]) -> None:
        self._at: dict[tuple[str, str], dict[str, Worker]] = {}
        self._of: dict[str, tuple[str, str]] = {}
        for worker in ready:
            self._of[worker.instance] = worker.node, worker.plugin
            self._at.setdefault((worker.node, worker.plugin), {})[worker.instance] = worker

    def at(self, node: str, plugin: str) -> Iterable[Worker]:
        return self._at.get((node, plugin), {}).values()

    def took(self, instance: str) -> None:
        """One more job went to `instance`."""
        crew = self._at[self._of[instance]]
        crew[instance] = structs.replace(crew[instance], free=crew[instance].free - 1)


def choose(node: str, plugin: str, contract: str, crews: Crews, but: Container[str] = ()) -> Worker | None:
    """The instance for a placed job: of the decided plugin on the decided node, the one with the most room, none of `but`."""
    crew = crews.at(node, plugin.removeprefix(WIDE))
    able = [w for w in crew if contract in w.contracts and w.free > 0 and w.instance not in but]
    return min(able, key=lambda w: (-w.free, w.instance), default=None)


def choose_all(decision: Decision, spec: JobSpec, crews: Crews) -> list[Worker]:
    """The instances for a placed job, each another one: as many as its gang has, where the decision puts them; [] if they are not
    there."""
    found: dict[str, Worker] = {}
    shares = decision.allocation if spec.gang > 1 else (Share(decision.node),)
    for node in (share.node for share in shares for _ in range(share.members)):
        worker = choose(node, decision.plugin, spec.uses.rpartition(".")[0], crews, found)
        if worker is None:
            return []
        found[worker.instance] = worker
    return list(found.values())


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


class Free:
    """What is free on the nodes now, while what was told to stop still holds its share."""

    def __init__(self, state: ClusterState) -> None:
        self._free = {node.name: node.free for node in state.nodes}

    def take(self, shares: Sequence[Share], request: Resources) -> bool:
        """Whether all members fit; then they are taken."""
        if not all(fits(times(request, share.members), self._free[share.node]) for share in shares):
            return False
        for share in shares:
            self._free[share.node] = left(self._free[share.node], [times(request, share.members)])
        return True

    def scale(self, decision: Decision, state: ClusterState) -> Decision:
        """The decision with as many further replicas as there is room for now."""
        model = next(m for m in state.models if m.name == decision.job)
        has = {share.node: share.members for share in model.allocation}
        shares = []
        for node, members in spread(decision.allocation).items():
            count = min(members, has.get(node, 0))
            while count < members and self.take((Share(node),), model.request):
                count += 1
            shares.append(Share(node, count))
        return structs.replace(decision, allocation=tuple(share for share in shares if share.members))
