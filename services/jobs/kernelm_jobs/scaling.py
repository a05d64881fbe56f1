"""Replicas of deployments: their load is measured, and what the scheduler decides about their number is carried out.

The number that is wanted is on record (`Deployment.replicas`) before anything is begun; what follows from it (`_settle`) compares
the record with the kernel's state and can be repeated at any time, so whoever was killed in the middle goes on with it.

To zero: first the route of the model moves to this service, then the pool is scaled to nothing, each instance drained, so no call
is lost. From then on a call comes here (`absent`): the caller is told at once that the model starts (`starting`, 503, with
`retry_after_s`), and the next round of the scheduler sees the call as load. When an instance is ready the route moves back.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Iterable

from msgspec import structs

from kernelm_contracts.jobs import Deployment, DeployRequest, JobRecord, ModelScaled
from kernelm_contracts.scheduler import Decision, ModelState, Share
from kernelm_jobs.cluster import Cluster
from kernelm_jobs.deploy import Deployer
from kernelm_jobs.deployment import has_ready, is_replica, request_of, route_to
from kernelm_jobs.holdings import size
from kernelm_jobs.load import Gauge, Load
from kernelm_jobs.rounds import MODEL
from kernelm_jobs.settings import Settings
from kernelm_jobs.states import HOLDING
from kernelm_jobs.table import Table
from kernelm_sdk.bus import Bus
from kernelm_sdk.errors import ClientFault, Fault, KernelFault
from kernelm_sdk.system import Empty, Kernel, Lifecycle, PoolSpec, Probe, ScaleRequest, SystemState

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
        self.wake: Callable[[], None] = lambda: None  # have a round

    # ---- what the scheduler is told ----

    @property
    def scaled(self) -> list[Deployment]:
        """The deployments whose number of replicas the scheduler decides on."""
        return [d for d in self._table.deployments.values() if (job := self._table.jobs.get(d.job)) and request_of(job).maximum]

    async def run(self) -> None:
        """Look at the load for ever, and have a round after each look."""
        while True:
            await asyncio.sleep(self._settings.load_every_s)
            if not (deployments := self.scaled):
                continue
            try:
                await self._look(deployments, await self._cluster.system())
            except Fault as fault:  # the kernel or the broker is away: nothing is known, so nothing changes
                log.warning("the load of deployments can't be measured: %s", fault.message)
                continue
            self.wake()

    async def _look(self, deployments: Iterable[Deployment], system: SystemState) -> None:
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
            if not self._settled(deployment, system):
                self._begin(deployment.name)

    def _gauge(self, name: str) -> Gauge:
        return self._gauges.setdefault(name, Gauge(self._settings.load_window_s, time.monotonic()))

    def states(self) -> list[ModelState]:
        """Every deployment that serves, with its load. One that is not scaled, or is being replaced now, stays as it is."""
        changing = {request_of(job).name for job in self._table.jobs.in_states(*HOLDING)
                    if is_replica(job) and not job.result}  # fmt: skip
        found = []
        for deployment in self._table.deployments.values():
            job = self._table.jobs.get(deployment.job)
            if job is not None and job.state in HOLDING and job.result:
                found.append(self._state(deployment, job, deployment.name in changing))
        return found

    def _state(self, deployment: Deployment, job: JobRecord, changing: bool) -> ModelState:
        request, load = request_of(job), self._loads.get(deployment.name, Load())
        low, high = bounds(request, deployment.replicas, changing)
        node = deployment.node or job.node
        allocation = (Share(node, deployment.replicas),) if deployment.replicas else ()
        return ModelState(deployment.name, job.spec.tenant, job.spec.resources, (MODEL + deployment.name,), deployment.artifact,
                          deployment.replicas, allocation, low, high, round(load.arrivals_per_s, 3), load.queue,
                          round(load.rate_per_s, 3), 1, load.latency_ms, request.objective_ms, round(load.idle_s, 1),
                          self._start_s.get(deployment.name, START_S), deployment.scaled or deployment.when, job.spec.priority,
                          zero_after_s=request.idle_s)  # fmt: skip

    # ---- a call while there is no instance ----

    def absent(self, model: str, caller: str) -> Fault:
        """What a call is told that was routed here, and the model is wanted again."""
        deployment = self._table.deployments.get(model)
        if deployment is None:
            return ClientFault("unknown_model", f"there is no deployment {model!r}", "`kernelm model list` shows what is deployed")
        self._gauge(model).knock(caller, time.monotonic())
        if load := self._loads.get(model):
            self._loads[model] = structs.replace(load, queue=max(load.queue, 1), idle_s=0.0)
        else:
            self._loads[model] = Load(queue=1)
        self.wake()
        after_s = self._start_s.get(model, START_S)
        return KernelFault("starting", f"{model} had no calls for a while, and is being started for this one",
                           "call again: callers with patience do so", retriable=True, retry_after_s=after_s)  # fmt: skip

    # ---- carrying out ----

    async def scale(self, decision: Decision) -> None:
        """Put the number of replicas that was decided on record, and begin with what follows from it."""
        replicas = size(decision.allocation)
        node = decision.allocation[0].node if decision.allocation else ""
        before, after = await self._table.deployments.update(decision.job, lambda now: structs.replace(
            now, replicas=replicas, node=node or now.node, scaled=time.time(), why=decision.reason)
            if (now.replicas, now.node) != (replicas, node or now.node) else now)  # fmt: skip
        if after is not before:
            log.info("%s goes from %d to %d replicas: %s", after.name, before.replicas, replicas, decision.reason)
            job = self._table.jobs.need(after.job)
            self._table.publish(ModelScaled(model=after.name, replicas=replicas, was=before.replicas, why=decision.reason,
                                            node=after.node, tenant=job.spec.tenant, cpu=job.spec.resources.cpu))  # fmt: skip
            self._begin(after.name)

    def recover(self) -> None:
        """After a restart: go on with what was begun."""
        for deployment in self.scaled:
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

    def _settled(self, deployment: Deployment, system: SystemState) -> bool:
        """Whether pool and route are as the record says."""
        spec = _pool(deployment, system)
        if spec is None or spec.parked or _swapped(deployment.name, system):
            return True  # a swap is about it: when that is over, the next look tells
        at = self._bus.user if deployment.replicas == 0 else deployment.pool
        return spec.instances == deployment.replicas and _route(deployment.name, system) in ("", at)

    async def _settle(self, name: str) -> None:
        """Make pool and route what the record says; a replacement of the model that is under way comes first."""
        async with self._deployer.alone(name):
            deployment = self._table.deployments.get(name)
            if deployment is None:
                return  # it was taken away meanwhile
            system = await self._cluster.system(PATIENCE_S)
            spec = _pool(deployment, system)
            if spec is None or self._settled(deployment, system):
                return
            begun = time.monotonic()
            if deployment.replicas == 0:
                await self._point(deployment, self._bus.user, "no calls: the next one starts an instance")
                await self._bus.call(Kernel.scale, ScaleRequest(spec.pool, 0), timeout_s=10.0, patience_s=PATIENCE_S)
                return
            node = deployment.node or spec.node
            if spec.node == node:
                if spec.instances != deployment.replicas:
                    wanted = ScaleRequest(spec.pool, deployment.replicas)
                    await self._bus.call(Kernel.scale, wanted, timeout_s=10.0, patience_s=PATIENCE_S)
            else:  # it had no instance, and its next ones are elsewhere
                moved = structs.replace(spec, node=node, instances=deployment.replicas)
                await self._bus.call(Kernel.start_pool, moved, timeout_s=10.0, patience_s=PATIENCE_S)
            if _route(name, system) != deployment.pool:
                await self._ready(deployment)
                self._start_s[name] = round(time.monotonic() - begun, 1)
                await self._point(deployment, deployment.pool, deployment.why)

    async def _ready(self, deployment: Deployment) -> None:
        """Until an instance is ready; PluginFault "not_ready" after `deploy_s`."""
        until = time.monotonic() + self._settings.deploy_s
        while not has_ready(deployment.pool, await self._cluster.system(PATIENCE_S)):
            if time.monotonic() > until:
                raise KernelFault("not_ready", f"{deployment.pool} has no ready instance within {self._settings.deploy_s:g} s",
                                  "see the log of its instances", retriable=True)  # fmt: skip
            await self._deployer.look()

    async def _point(self, deployment: Deployment, pool: str, why: str) -> None:
        await self._bus.call(Kernel.set_route, route_to(deployment, pool, why), timeout_s=10.0, patience_s=PATIENCE_S)


def bounds(request: DeployRequest, replicas: int, changing: bool) -> tuple[int, int]:
    """(fewest, most) replicas that may be decided on now."""
    if changing or not request.maximum:
        return replicas, replicas
    return request.minimum, max(request.maximum, request.minimum)


def _pool(deployment: Deployment, system: SystemState) -> PoolSpec | None:
    return next((p for p in system.pools if p.pool == deployment.pool), None)


def _swapped(name: str, system: SystemState) -> bool:
    return any(name in s.routes and not s.over for s in system.swaps)


def _route(name: str, system: SystemState) -> str:
    """Where all calls of the model go; "" where they are spread."""
    to = next((r.to for r in system.routes if r.kind == "model" and r.name == name), ())
    return to[0].pool if len(to) == 1 else ""
