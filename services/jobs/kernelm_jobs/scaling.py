"""Replicas of deployments: their load is measured, and what the scheduler decides about their number and place is carried out.

The number that is wanted is on record (`Deployment.replicas`) before anything is begun; what follows from it (`_settle`) compares
the record with the kernel's state and can be repeated at any time, so whoever was killed in the middle goes on with it.

To zero: first the route of the model moves to this service, then the pool is scaled to nothing, each instance drained, so no call
is lost. From then on a call comes here (`absent`): the caller is told at once that the model starts (`starting`, 503, with
`retry_after_s`), and the next round of the scheduler sees the call as load. When an instance is ready the route moves back.

Elsewhere: a deployment whose node is gone (`holdings.stranded`) holds nothing any more, its calls are told so by this service, and
the scheduler is shown that it has no replica and needs as many as before. Where it decides on another node, that is on record
before the pool is moved there, under its own name: the generation stays, and the kernel stops what would run of it anywhere else.
Until then it waits, and the record says for what; where its node comes back first, it goes on there.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Mapping

from msgspec import structs

from kernelm_contracts.jobs import WAITS, Deployment, DeployRequest, JobRecord, ModelScaled
from kernelm_contracts.scheduler import Decision, ModelState, Share
from kernelm_jobs.cluster import Cluster
from kernelm_jobs.deploy import Deployer
from kernelm_jobs.deployment import answers, has_ready, is_replica, request_of, route_to
from kernelm_jobs.holdings import home, serving, size, stranded
from kernelm_jobs.load import Gauge, Load
from kernelm_jobs.rounds import MODEL
from kernelm_jobs.settings import Settings
from kernelm_jobs.states import HOLDING
from kernelm_jobs.table import Table
from kernelm_sdk.bus import Bus
from kernelm_sdk.errors import ClientFault, Fault, KernelFault
from kernelm_sdk.system import Empty, Kernel, Lifecycle, PoolName, PoolSpec, Probe, ScaleRequest, SystemState

log = logging.getLogger("kernelm.jobs")
PATIENCE_S = 30.0  # for a kernel that restarts
START_S = 3.0  # until a new replica answers, before one was measured


class Scaling:
    """Knows the load of all deployments, and makes them as large as was decided."""

    def __init__(self, bus: Bus, table: Table, cluster: Cluster, deployer: Deployer, settings: Settings) -> None:
        self._bus, self._table, self._cluster, self._deployer, self._settings = bus, table, cluster, deployer, settings
        self._gauges: dict[str, Gauge] = {}
        self._loads: dict[str, Load] = {}
        self._start_s: dict[str, float] = {}  # deployment -> how long its last start took
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._stranded: dict[str, str] = {}  # deployment without a place -> what has become of its node
        self.wake: Callable[[], None] = lambda: None  # have a round

    # ---- what the scheduler is told ----

    @property
    def scaled(self) -> list[Deployment]:
        """The deployments whose number of replicas the scheduler decides on."""
        return [d for d in self._table.deployments.values() if (job := self._table.jobs.get(d.job)) and request_of(job).maximum]

    async def run(self) -> None:
        """Look for ever at the load, and at whether all is as the record says; have a round after each look at the load."""
        while True:
            await asyncio.sleep(self._settings.load_every_s)
            if not (deployments := list(self._table.deployments.values())):
                continue
            try:
                system = await self._cluster.system()
                await self._measure(scaled := self.scaled, system)
            except Fault as fault:  # the kernel or the broker is away: nothing is known, so nothing changes
                log.warning("the load of deployments can't be measured: %s", fault.message)
                continue
            for deployment in deployments:
                if not self._settled(deployment, system):
                    self._begin(deployment.name)
            if scaled:
                self.wake()

    async def _measure(self, deployments: Iterable[Deployment], system: SystemState) -> None:
        async def ask(instance: str) -> tuple[str, Probe] | None:
            try:
                probe: Probe = await self._bus.call(Lifecycle.probe, Empty(), instance=instance, timeout_s=2.0)
                return instance, probe
            except Fault as fault:  # its lease tells whether it lives
                log.warning("the load of %s is not known: %s", instance, fault.message)
                return None

        for deployment in deployments:
            mine = [i.id for i in system.instances if i.pool == deployment.pool and i.state == "ready"]
            probes = dict(found for found in await asyncio.gather(*map(ask, mine)) if found)
            self._loads[deployment.name] = self._gauge(deployment.name).look(probes, time.monotonic())

    def _gauge(self, name: str) -> Gauge:
        return self._gauges.setdefault(name, Gauge(self._settings.load_window_s, time.monotonic()))

    def states(self, system: SystemState) -> list[ModelState]:
        """Every deployment that serves, with its load. One that is not scaled, or is being replaced now, stays as it is."""
        changing = {request_of(job).name for job in self._table.jobs.in_states(*HOLDING)
                    if is_replica(job) and not job.result}  # fmt: skip
        found, self._stranded = [], {}
        for deployment in self._table.deployments.values():
            job = self._table.jobs.get(deployment.job)
            if job is not None and job.state in HOLDING and job.result:
                if lost := stranded(deployment, home(deployment, job), system):
                    self._stranded[deployment.name] = lost
                found.append(self._state(deployment, job, deployment.name in changing, bool(lost)))
        return found

    def _state(self, deployment: Deployment, job: JobRecord, changing: bool, lost: bool) -> ModelState:
        request, load = request_of(job), self._loads.get(deployment.name, Load())
        low, high = bounds(request, deployment.replicas, changing)
        replicas = deployment.replicas
        if lost:  # it has none, and is to come back as large as it was
            replicas, low, high = 0, max(low, replicas), max(high, replicas)
        allocation = (Share(home(deployment, job), replicas),) if replicas else ()
        return ModelState(deployment.name, job.spec.tenant, job.spec.resources, (MODEL + deployment.name,), deployment.artifact,
                          replicas, allocation, low, high, round(load.arrivals_per_s, 3), load.queue,
                          round(load.rate_per_s, 3), 1, load.latency_ms, request.objective_ms, round(load.idle_s, 1),
                          self._start_s.get(deployment.name, START_S), deployment.scaled or deployment.when, job.spec.priority,
                          zero_after_s=request.idle_s, within="node")  # fmt: skip

    # ---- a call while there is no instance ----

    def absent(self, model: str, caller: str) -> Fault:
        """What a call is told that was routed here, and the model is wanted again."""
        deployment = self._table.deployments.get(model)
        if deployment is None:
            return ClientFault("unknown_model", f"there is no deployment {model!r}", "`kernelm model list` shows what is deployed")
        after_s = self._start_s.get(model, START_S)
        if deployment.replicas:
            waits = deployment.why if deployment.waits else self._stranded.get(model)
            why = waits or "an instance is being started"
            return KernelFault("starting", f"{model} has no instance now: {why}", "call again: callers with patience do so",
                               retriable=True, retry_after_s=after_s)  # fmt: skip
        self._gauge(model).knock(caller, time.monotonic())
        if load := self._loads.get(model):
            self._loads[model] = structs.replace(load, queue=max(load.queue, 1), idle_s=0.0)
        else:
            self._loads[model] = Load(queue=1)
        self.wake()
        return KernelFault("starting", f"{model} had no calls for a while, and is being started for this one",
                           "call again: callers with patience do so", retriable=True, retry_after_s=after_s)  # fmt: skip

    # ---- carrying out ----

    async def scale(self, decision: Decision) -> None:
        """Put the number of replicas that was decided on record, and begin with what follows from it."""
        replicas, lost = size(decision.allocation), self._stranded.pop(decision.job, "")
        node = decision.allocation[0].node if decision.allocation else ""
        why = f"{lost}; {decision.reason}" if lost else decision.reason
        before, after = await self._table.deployments.update(decision.job, lambda now: structs.replace(
            now, replicas=replicas, node=node or now.node, scaled=time.time(), why=why)
            if (now.replicas, now.node) != (replicas, node or now.node) else now)  # fmt: skip
        if after is not before:
            log.info("%s goes from %d to %d replicas: %s", after.name, 0 if lost else before.replicas, replicas, why)
            if after.node != before.node:
                await self._say(after, f"moves to node {after.node}: {why}", (Share(after.node, replicas),))
            self._scaled(after, replicas, 0 if lost else before.replicas, why)
            self._begin(after.name)

    async def explain(self, reasons: Mapping[str, str], otherwise: str = f"{WAITS}the scheduler has no place for it") -> None:
        """Put on record for what those wait that lost their node, and found no place in this round."""
        for name, lost in list(self._stranded.items()):
            why = f"{WAITS}{reasons.get(name, otherwise).removeprefix(WAITS)}; {lost}"
            if (found := self._table.deployments.get(name)) is not None:
                await self._table.deployments.update(name, lambda now, why=why: now if now.why == why else  # type: ignore[misc]
                                                     structs.replace(now, why=why))  # fmt: skip
                await self._say(found, why)

    def waiting(self, job: JobRecord) -> str:
        """The deployment that the job serves and that waits for a place; "" for none."""
        deployments = {d.name: d for d in self._table.deployments.values()}
        found = serving(job, deployments) if job.state in HOLDING else None
        return found.name if found is not None and found.waits else ""

    async def _say(self, deployment: Deployment, why: str, allocation: tuple[Share, ...] = ()) -> None:
        """Put on the record of the deployment's job how it is, and where, if that is new."""

        def change(now: JobRecord) -> JobRecord:
            new = structs.replace(now, why=why)
            return structs.replace(new, node=allocation[0].node, allocation=allocation) if allocation else new

        job = self._table.jobs.get(deployment.job)
        if job is not None and (job.why != why or allocation):
            await self._table.move_all({job.id: lambda now: change(now) if now.state == "running" else now})

    def _scaled(self, deployment: Deployment, replicas: int, was: int, why: str) -> None:
        """Tell everybody."""
        job = self._table.jobs.need(deployment.job)
        self._table.publish(ModelScaled(model=deployment.name, replicas=replicas, was=was, why=why, node=deployment.node,
                                        tenant=job.spec.tenant, cpu=job.spec.resources.cpu))  # fmt: skip

    def recover(self) -> None:
        """After a restart: go on with what was begun."""
        for deployment in self._table.deployments.values():
            self._begin(deployment.name)

    def _begin(self, name: str) -> None:
        if name not in self._tasks:
            task = self._tasks[name] = asyncio.create_task(self._settle(name))
            task.add_done_callback(lambda done: self._ended(name, done))

    def _ended(self, name: str, task: asyncio.Task[None]) -> None:
        self._tasks.pop(name, None)
        if not task.cancelled() and (error := task.exception()):
            log.error("scaling %s failed, and is tried again at the next look: %s", name, error)

    async def stop(self) -> None:
        """Leave what is under way as it is: the next life of this service goes on with it."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _lost(self, deployment: Deployment, system: SystemState) -> str:
        """What has become of the node of a deployment that has no replica since; "" for nothing."""
        job = self._table.jobs.get(deployment.job)
        return stranded(deployment, home(deployment, job), system) if job is not None else ""

    def _settled(self, deployment: Deployment, system: SystemState) -> bool:
        """Whether pool and route are as the record says, and the record of its job tells how it is."""
        spec, lost = _pool(deployment, system), self._lost(deployment, system)
        if spec is None or spec.parked:
            return True
        placed = not deployment.replicas or spec.node == (deployment.node or spec.node)
        waits = deployment.waits and not lost  # no more
        if _swapped(deployment.name, system):
            return placed and not waits  # a swap is about number and route: when that is over, the next look tells
        at = self._bus.user if deployment.replicas == 0 or lost else deployment.pool
        there = placed and spec.instances == deployment.replicas and _route(deployment.name, system) in ("", at)
        return there and not waits and (bool(lost) or self._told(deployment))

    def _told(self, deployment: Deployment) -> bool:
        job = self._table.jobs.get(deployment.job)
        return job is None or job.state != "running" or job.why == answers(deployment.name, deployment.generation)

    async def _settle(self, name: str) -> None:
        """Make pool and route what the record says. While a replacement of the model is under way only the place, for that may
        take long, as a canary that is watched; all else when it is over."""
        deployment, system = self._table.deployments.get(name), await self._cluster.system(PATIENCE_S)
        if deployment is not None and _swapped(name, system):
            if not await self._move(deployment, system) and not self._settled(deployment, system):
                await self._tell(deployment)
            return
        async with self._deployer.alone(name):
            deployment, system = self._table.deployments.get(name), await self._cluster.system(PATIENCE_S)
            if deployment is None:
                return  # it was taken away meanwhile
            spec = _pool(deployment, system)
            if spec is None or self._settled(deployment, system):
                return
            begun, to = time.monotonic(), _route(name, system)
            if deployment.replicas == 0:
                if to != self._bus.user:
                    await self._point(deployment, self._bus.user, "no calls: the next one starts an instance")
                await self._scale_pool(spec, 0)
            elif lost := self._lost(deployment, system):
                await self._point(deployment, self._bus.user, lost)
                self._scaled(deployment, 0, deployment.replicas, lost)
                return
            else:
                if not await self._move(deployment, system) and spec.instances != deployment.replicas:
                    await self._scale_pool(spec, deployment.replicas)
                if to != deployment.pool:
                    await self._ready(deployment)
                    self._start_s[name] = round(time.monotonic() - begun, 1)
                    await self._point(deployment, deployment.pool, self._since(deployment))
            await self._tell(deployment)

    async def _scale_pool(self, spec: PoolSpec, instances: int) -> None:
        await self._bus.call(Kernel.scale, ScaleRequest(spec.pool, instances), timeout_s=10.0, patience_s=PATIENCE_S)

    async def _move(self, deployment: Deployment, system: SystemState) -> bool:
        """Have the pool on the node that was decided; whether it was on another one."""
        spec = _pool(deployment, system)
        if spec is None or spec.parked or not deployment.replicas or spec.node == (deployment.node or spec.node):
            return False
        moved = structs.replace(spec, node=deployment.node, instances=deployment.replicas)
        await self._bus.call(Kernel.start_pool, moved, timeout_s=10.0, patience_s=PATIENCE_S)
        now = self._table.deployments.get(deployment.name)
        if now is None or now.pool != spec.pool:  # what replaces it has ended it meanwhile
            await self._bus.call(Kernel.stop_pool, PoolName(spec.pool), timeout_s=10.0, patience_s=PATIENCE_S)
        elif _route(deployment.name, system) != self._bus.user:  # else it is ready before it gets calls again
            await self._ready(deployment)
            await self._tell(deployment)
        return True

    def _since(self, deployment: Deployment) -> str:
        """Why it is as it is, now that it does not wait."""
        if not deployment.waits:
            return deployment.why
        node = home(deployment, self._table.jobs.need(deployment.job))
        return f"node {node} is there again"  # before another one had room

    async def _tell(self, deployment: Deployment) -> None:
        """Put on record that it answers, or would if it were called."""
        if (why := self._since(deployment)) != deployment.why:
            await self._table.deployments.update(deployment.name, lambda now: structs.replace(now, why=why)
                                                 if now.why == deployment.why else now)  # fmt: skip
            self._scaled(deployment, deployment.replicas, 0, why)
        await self._say(deployment, answers(deployment.name, deployment.generation))

    async def _ready(self, deployment: Deployment) -> None:
        """Until an instance is ready; KernelFault "not_ready" after `deploy_s`, or where none will be: the next look tells more."""
        until = time.monotonic() + self._settings.deploy_s
        while not has_ready(deployment.pool, system := await self._cluster.system(PATIENCE_S)):
            now = self._table.deployments.get(deployment.name)
            if now is None or (now.pool, now.node) != (deployment.pool, deployment.node) or self._lost(now, system):
                raise KernelFault("not_ready", f"{deployment.pool} has lost its place before it was ready", retriable=True)
            if time.monotonic() > until:
                raise KernelFault("not_ready", f"{deployment.pool} has no ready instance within {self._settings.deploy_s:g} s",
                                  "see the log of its instances", retriable=True)  # fmt: skip
            await self._deployer.look()

    async def _point(self, deployment: Deployment, pool: str, why: str) -> None:
        await self._bus.call(Kernel.set_route, route_to(deployment, pool, why), timeout_s=10.0, patience_s=PATIENCE_S)


def bounds(request: DeployRequest, replicas: int, changing: bool) -> tuple[int, int]:
    """(fewest, most) replicas that may be decided on now."""
    if changing:
        return replicas, replicas
    if not request.maximum:  # fewer, where a node had no room for more
        return request.instances, request.instances
    return request.minimum, max(request.maximum, request.minimum)


def _pool(deployment: Deployment, system: SystemState) -> PoolSpec | None:
    return next((p for p in system.pools if p.pool == deployment.pool), None)


def _swapped(name: str, system: SystemState) -> bool:
    return any(name in s.routes and not s.over for s in system.swaps)


def _route(name: str, system: SystemState) -> str:
    """Where all calls of the model go; "" where they are spread."""
    to = next((r.to for r in system.routes if r.kind == "model" and r.name == name), ())
    return to[0].pool if len(to) == 1 else ""
