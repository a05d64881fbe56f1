"""Deploying: a pool is started, awaited, routed to, recorded; then what served under the name before is stopped.

Every step can be repeated, so a deployment that was interrupted by a crash goes on from its beginning. The order keeps
the name answering throughout: the new pool is ready before the route moves, the old one stops after.
"""

import asyncio
import contextlib
import logging
import time
from collections import defaultdict

from kernelm_contracts.jobs import Deployment, JobRecord, ModelDeployed
from kernelm_jobs.cluster import Cluster
from kernelm_jobs.deployment import (
    DeployRequest,
    has_ready,
    is_replica,
    outdated_pools,
    pool_of,
    pool_spec,
    request_of,
    result_of,
    trouble,
)
from kernelm_jobs.states import HOLDING, advance, failed
from kernelm_jobs.table import Table
from kernelm_sdk.bus import Bus
from kernelm_sdk.errors import ClientFault, Fault, PluginFault, from_body
from kernelm_sdk.system import Destination, Kernel, PoolName, PoolSpec, Progress, Route, SystemState

log = logging.getLogger("kernelm.jobs")
PATIENCE_S = 60.0  # for a kernel that restarts


class Deployer:
    """Carries out placed replicas, one at a time for each name."""

    def __init__(self, bus: Bus, table: Table, cluster: Cluster, deploy_s: float) -> None:
        self._bus, self._table, self._cluster, self._deploy_s = bus, table, cluster, deploy_s
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._names: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._changed = asyncio.Event()  # an instance went to another state

    async def recover(self) -> None:
        """After a restart: go on with what was under way, finish what had moved, and check what should serve."""
        for job in self._table.jobs.values():
            if is_replica(job) and job.state in HOLDING and not job.result:
                self.begin(job)
        system = await self._cluster.system(PATIENCE_S)
        for deployment in self._table.deployments.values():
            await self._retire(deployment, system)
            if all(p.pool != deployment.pool for p in system.pools):
                log.error("deployment %s: the kernel does not want its pool %s any more", deployment.name, deployment.pool)

    def begin(self, job: JobRecord) -> None:
        """Deploy a placed replica in the background."""
        task = self._tasks[job.id] = asyncio.create_task(self._run(job))
        task.add_done_callback(lambda done: self._ended(job.id, done))

    def _ended(self, id: str, task: asyncio.Task[None]) -> None:
        if self._tasks.get(id) is task:
            del self._tasks[id]
        if not task.cancelled() and (error := task.exception()):
            log.error("deployment %s ended with a bug", id, exc_info=error)

    def changed(self) -> None:
        """Look again at the pool that is awaited."""
        self._changed.set()

    async def stop(self) -> None:
        """Leave what is under way as it is: the next life of this service goes on with it."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def abort(self, job: JobRecord) -> None:
        """Stop deploying a cancelled replica, and its pool if that does not serve."""
        if task := self._tasks.pop(job.id, None):
            task.cancel()
            await asyncio.wait([task])
        request = request_of(job)
        async with self._names[request.name]:
            await self._stop_unserved(request)

    async def _run(self, job: JobRecord) -> None:
        request = request_of(job)
        async with self._names[request.name]:
            try:
                await self._deploy(job, request)
            except Fault as fault:
                log.warning("deployment of %s failed: %s", request.name, fault)
                await self._fail(job, request, fault)

    async def _deploy(self, job: JobRecord, request: DeployRequest) -> None:
        last = self._table.deployments.get(request.name)
        generation = 1 if last is None else last.generation + (last.job != job.id)
        spec = pool_spec(request, generation, job.node)
        await self._table.move(job.id, lambda now: advance(_mine(now, job), "accept"))
        await self._bus.call(Kernel.start_pool, spec, timeout_s=10.0, patience_s=PATIENCE_S)
        await self._await_ready(job, spec)
        route = Route(request.name, "model", (Destination(spec.pool, 100),), generation, request.model, f"deployed by {job.id}")
        await self._bus.call(Kernel.set_route, route, timeout_s=10.0, patience_s=PATIENCE_S)
        deployment = Deployment(request.name, generation, request.model, spec.pool, request.plugin, job.id, job.spec.run,
                                time.time())  # fmt: skip
        await self._record(deployment)
        self._table.publish(ModelDeployed(model=request.name, generation=generation, artifact=request.model, pool=spec.pool))
        why = f"answers as {request.name}, generation {generation}"
        await self._table.move(job.id, lambda now: advance(_mine(now, job), "serve", result=result_of(deployment), why=why,
                                                           progress=Progress(1.0, "serving")))  # fmt: skip
        await self._retire(deployment, await self._cluster.system(PATIENCE_S))

    async def _await_ready(self, job: JobRecord, spec: PoolSpec) -> None:
        """Until an instance of the pool is ready; PluginFault if the kernel gives up on it, or after `deploy_s`."""
        until = time.monotonic() + self._deploy_s
        while True:
            self._changed.clear()
            system = await self._cluster.system(PATIENCE_S)
            if has_ready(spec.pool, system):
                return
            if body := trouble(spec.pool, system):
                raise from_body(body)
            mine = [i for i in system.instances if i.pool == spec.pool]
            states = ", ".join(f"{i.id} is {i.state}{': ' * bool(i.reason)}{i.reason}" for i in mine) or "no instance yet"
            if time.monotonic() > until:
                raise PluginFault("not_ready", f"pool {spec.pool} was not ready within {self._deploy_s:g} s: {states}",
                                  "see the log of its instances", retriable=True)  # fmt: skip
            await self._table.progress(job.id, job.epoch, Progress(0.0, "starting", states))
            with contextlib.suppress(TimeoutError):  # not every change makes an event: a quarantine does not
                async with asyncio.timeout(1.0):
                    await self._changed.wait()

    async def _record(self, new: Deployment) -> None:
        if not await self._table.deployments.create(new.name, new):
            await self._table.deployments.update(new.name, lambda old: new if old.generation <= new.generation else _newer(old))

    async def _retire(self, current: Deployment, system: SystemState) -> None:
        """Stop the pools that served under the name before, and release what their replicas hold."""
        for pool in outdated_pools(current, system):
            await self._bus.call(Kernel.stop_pool, PoolName(pool), timeout_s=10.0, patience_s=PATIENCE_S)
        why = f"{current.job} serves {current.name} now, as generation {current.generation}"
        for job in self._table.jobs.values():
            serves = is_replica(job) and job.state == "running" and bool(job.result)
            if serves and job.id != current.job and request_of(job).name == current.name:
                await self._table.move(job.id, lambda now: advance(now, "supersede", why=why) if now.state == "running" else now)

    async def _fail(self, job: JobRecord, request: DeployRequest, fault: Fault) -> None:
        await self._table.move(job.id, lambda now: failed(now, fault.body()) if _same(now, job) else now)
        try:
            await self._stop_unserved(request)
        except Fault as second:
            log.error("what was begun of %s can't be stopped: %s", request.name, second)

    async def _stop_unserved(self, request: DeployRequest) -> None:
        """Stop the next generation's pool, unless the route has moved to it already and only the record is missing."""
        last = self._table.deployments.get(request.name)
        pool = pool_of(request, last.generation + 1 if last else 1)
        routes = (await self._cluster.system(PATIENCE_S)).routes
        if any(d.pool == pool for r in routes for d in r.to):
            return
        await self._bus.call(Kernel.stop_pool, PoolName(pool), timeout_s=10.0, patience_s=PATIENCE_S)


def _same(now: JobRecord, job: JobRecord) -> bool:
    return now.epoch == job.epoch and now.state in HOLDING


def _mine(now: JobRecord, job: JobRecord) -> JobRecord:
    if not _same(now, job):
        raise ClientFault("stale_epoch", f"{job.id} is {now.state} at epoch {now.epoch}, not {job.epoch}")
    return now


def _newer(old: Deployment) -> Deployment:
    raise ClientFault("stale_generation", f"{old.name} is at generation {old.generation} by now")
