"""Deploying: the kernel swaps the pool of the new model for that of the old one, and what came of it is put on record.

The kernel carries out the swap (kernel/1.swap), and goes on with it when it is killed; this follows it. What is written before
the swap is asked for (`Attempt`) names its pool, so a deployment that was interrupted by a crash finds its swap again.
"""

import asyncio
import contextlib
import logging
import math
import time
from collections import defaultdict

from msgspec import structs

from kernelm_contracts.deployments import Deployment, DeployRequest, RollbackDeployment
from kernelm_contracts.jobs import JobRecord, JobSpec, ModelDeployed, ModelScaled
from kernelm_jobs.cluster import Cluster
from kernelm_jobs.deployment import (
    Attempt,
    answers,
    follows,
    is_replica,
    is_routed,
    next_generation,
    outdated_pools,
    pool_of,
    pool_spec,
    progress_of,
    raise_if_over,
    request_of,
    result_of,
    route_to,
    swap_of,
    swap_request,
    trial_request,
)
from kernelm_jobs.examining import examine
from kernelm_jobs.holdings import shares_of, spread
from kernelm_jobs.states import HOLDING, advance, failed
from kernelm_jobs.table import Table
from kernelm_sdk.bus import Bus
from kernelm_sdk.errors import ClientFault, Fault, FaultBody, PluginFault
from kernelm_sdk.system import Kernel, PoolName, PoolSpec, Progress, RollbackRequest, Swap, SystemState, UnloadRequest

log = logging.getLogger("kernelm.jobs")
PATIENCE_S = 60.0  # for a kernel that restarts
PENDING = ("starting", "watching")  # phases of a swap that can still go back


class Deployer:
    """Carries out placed replicas, one at a time for each name."""

    def __init__(self, bus: Bus, table: Table, cluster: Cluster, deploy_s: float) -> None:
        self._bus, self._table, self._cluster, self._deploy_s = bus, table, cluster, deploy_s
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._names: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._changed = asyncio.Event()  # an instance went to another state, or a swap to another phase

    async def recover(self) -> None:
        """After a restart: go on with what was under way, finish what had moved, and check what should serve."""
        for job in self._table.jobs.in_states(*HOLDING):
            if is_replica(job) and not job.result:
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
        """Look again at what is awaited."""
        self._changed.set()

    def alone(self, name: str) -> asyncio.Lock:
        """Held while anything about the deployment `name` changes."""
        return self._names[name]

    async def stop(self) -> None:
        """Leave what is under way as it is: the next life of this service goes on with it."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def abort(self, job: JobRecord) -> None:
        """Turn the swap of a cancelled replica back, unless it has its calls for good."""
        if task := self._tasks.pop(job.id, None):
            task.cancel()
            await asyncio.wait([task])
        async with self._names[request_of(job).name]:
            await self._turn_back(job, f"job {job.id} was cancelled")

    async def undeploy(self, name: str, why: str) -> Deployment:
        """Take a deployment away. ClientFault "conflict" while another version is being deployed. What was begun by one that was
        killed in the middle is done by the next call."""
        self._table.deployment(name)
        for job in self._table.jobs.in_states(*HOLDING):
            if is_replica(job) and not job.result and request_of(job).name == name:
                raise ClientFault("conflict", f"job {job.id} is deploying another version of {name}",
                                  f"wait for it, or `kernelm jobs cancel {job.id}`", retriable=True)  # fmt: skip
        async with self._names[name]:
            last = self._table.deployment(name)
            system = await self._cluster.system(PATIENCE_S)
            if any(p.pool == last.pool for p in system.pools):  # while it sleeps, its route leads to this service
                await self._bus.call(Kernel.set_route, route_to(last, last.pool, why), timeout_s=10.0, patience_s=PATIENCE_S)
                unload = UnloadRequest(last.pool, force=True, why=why)
                await self._bus.call(Kernel.unload, unload, timeout_s=10.0, patience_s=PATIENCE_S)
            for pool in outdated_pools(last, system):
                await self._bus.call(Kernel.stop_pool, PoolName(pool), timeout_s=10.0, patience_s=PATIENCE_S)
            await self._release(name, why)
            await self._table.deployments.delete(name)
            self._table.publish(ModelScaled(model=name, replicas=0, was=last.replicas, why=why, node=", ".join(last.spread)))
        return last

    def before(self, request: RollbackDeployment) -> JobSpec:
        """The job that brings back what a deployment served before; ClientFault if there is no such thing."""
        now = self._table.deployment(request.name)
        past = next((p for p in now.history if (p.artifact, p.plugin) != (now.artifact, now.plugin)), None)
        if past is None:
            raise ClientFault("not_found", f"{now.name!r} has served no other model than its present one",
                              "deploy one by a stage that uses \"deploy\"")  # fmt: skip
        replica = self._table.jobs.need(now.job)
        why = request.why or f"rollback of generation {now.generation} to the model of generation {past.generation}"
        back = structs.replace(request_of(replica), model=past.artifact, plugin=past.plugin, canary=request.canary,
                               watch_s=request.watch_s, why=why)  # fmt: skip
        spec = replica.spec
        return JobSpec(f"{now.name}-rollback", spec.uses, structs.asdict(back), spec.resources, spec.plugin, spec.tenant,
                       spec.priority, spec.attempts)  # fmt: skip

    # ---- a replica's life until it serves ----

    async def _run(self, job: JobRecord) -> None:
        request = request_of(job)
        async with self._names[request.name]:
            try:
                await self._deploy(job, request)
            except Fault as fault:
                log.warning("deployment of %s failed: %s", request.name, fault)
                await self._fail(job, fault)

    async def _deploy(self, job: JobRecord, request: DeployRequest) -> None:
        attempt = await self._attempt(job, request)
        where = spread(shares_of(job))
        count = sum(where.values())
        spec = pool_spec(request, attempt.generation, where, job.spec.resources)
        await self._table.move(job.id, lambda now: advance(_mine(now, job), "accept"))
        if request.checks and swap_of(spec.pool, await self._cluster.system(math.inf)) is None:
            await self._try(job, request, spec, attempt.generation)
        await self._follow(job, request.name, await self._swap(job, request, spec, attempt.generation), PENDING)
        before = self._table.deployments.get(request.name)
        was = before.replicas if before else 0
        deployment = await self._record(Deployment(request.name, attempt.generation, request.model, spec.pool, request.plugin,
                                                   job.id, job.spec.run, time.time(), node=spec.node, replicas=count,
                                                   places=spec.places))  # fmt: skip
        self._table.publish(ModelDeployed(model=request.name, generation=attempt.generation, artifact=request.model,
                                          pool=spec.pool))  # fmt: skip
        self._table.publish(ModelScaled(model=request.name, replicas=count, was=was, why=f"generation {attempt.generation}",
                                        node=", ".join(where), tenant=job.spec.tenant, cpu=job.spec.resources.cpu))  # fmt: skip
        why = answers(request.name, attempt.generation)
        served = await self._table.move(job.id, lambda now: advance(_mine(now, job), "serve", result=result_of(deployment), why=why,
                                                                    progress=Progress(1.0, "serving")))  # fmt: skip
        await self._drained(spec.pool)
        if served.state == "running":
            await self._retire(deployment, await self._cluster.system(math.inf))

    async def _attempt(self, job: JobRecord, request: DeployRequest) -> Attempt:
        """The generation that this job has in this attempt: on record before anything is begun with it."""
        last = self._table.attempts.get(request.name)
        if last is not None and (last.job, last.epoch) == (job.id, job.epoch):
            return last
        system = await self._cluster.system(math.inf)
        generation = next_generation(request.name, self._table.deployments.get(request.name), last, system)
        attempt = Attempt(request.name, generation, pool_of(request, generation), job.id, job.epoch)
        if last is None:
            await self._table.attempts.create(request.name, attempt)
        else:
            await self._table.attempts.update(request.name, lambda _: attempt)
        return attempt

    async def _try(self, job: JobRecord, request: DeployRequest, spec: PoolSpec, generation: int) -> None:
        """Start the new pool, which gets no calls, and ask it; PluginFault "poor_quality" if it knows too little."""
        swap = await self._swap(job, request, spec, generation, trial=True)
        await self._follow(job, request.name, swap, (*PENDING, "retiring"))
        system = await self._cluster.system(math.inf)
        instance = next((i.id for i in system.instances if i.pool == spec.pool and i.state == "ready"), "")
        if not instance:
            raise PluginFault("not_ready", f"the instances of {spec.pool} have ended", "see their logs", retriable=True)
        await self._table.progress(job.id, job.epoch, Progress(0.0, "checking", f"{len(request.checks)} known answers"))
        await examine(self._bus, instance, request)

    async def _swap(self, job: JobRecord, request: DeployRequest, spec: PoolSpec, generation: int, trial: bool = False) -> Swap:
        """The swap to `spec`: that of an earlier life, or one that is begun now, once no other is about the same name."""
        while True:
            system = await self._cluster.system(math.inf)
            if found := swap_of(spec.pool, system, trial):
                return found
            wanted = swap_request(request, spec, generation, job.id, self._deploy_s, system)
            wanted = trial_request(wanted) if trial else wanted
            try:
                begun: Swap = await self._bus.call(Kernel.swap, wanted, timeout_s=10.0, patience_s=math.inf)
                return begun
            except ClientFault as fault:  # ours, whose answer was lost; or another's, which has to end first
                if fault.code != "conflict":
                    raise
                await self._table.progress(job.id, job.epoch, Progress(0.0, "waiting", fault.message))
            await self.look()

    async def _follow(self, job: JobRecord, name: str, swap: Swap, phases: tuple[str, ...]) -> None:
        """Until the swap is in none of `phases`; PluginFault if it did not come to its aim."""
        system: SystemState | None = None
        while swap.phase in phases:
            await self._table.progress(job.id, job.epoch, progress_of(swap, system or await self._cluster.system(math.inf),
                                                                      time.time()))  # fmt: skip
            await self.look()
            system = await self._cluster.system(math.inf)
            found = next((s for s in system.swaps if s.id == swap.id), None)
            if found is None:  # over for long: the kernel keeps the last ones only
                if is_routed(swap.pool, system):
                    return
                raise PluginFault("not_ready", f"the kernel has no record of the swap of {name} to {swap.pool} any more",
                                  "deploy it again", retriable=True)  # fmt: skip
            swap = found
        raise_if_over(swap, name, system or await self._cluster.system(math.inf))

    async def _drained(self, pool: str) -> None:
        """Until what served before `pool` has answered its last call."""
        while (swap := swap_of(pool, await self._cluster.system(math.inf))) is not None and swap.phase == "retiring":
            await self.look()

    async def look(self) -> None:
        """Until something has changed, or a second: not every change makes an event."""
        self._changed.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(1.0):
                await self._changed.wait()

    # ---- the record, and what is left of others ----

    async def _record(self, new: Deployment) -> Deployment:
        if await self._table.deployments.create(new.name, new):
            return new
        _, stored = await self._table.deployments.update(
            new.name, lambda old: follows(new, old) if old.generation <= new.generation else _newer(old))  # fmt: skip
        return stored

    async def _retire(self, current: Deployment, system: SystemState) -> None:
        """Drop the pools that served under the name before, and release what their replicas hold."""
        for pool in outdated_pools(current, system):
            await self._bus.call(Kernel.stop_pool, PoolName(pool), timeout_s=10.0, patience_s=PATIENCE_S)
        why = f"{current.job} serves {current.name} now, as generation {current.generation}"
        await self._release(current.name, why, but=current.job)

    async def _release(self, name: str, why: str, but: str = "") -> None:
        """End the jobs that have served under the name."""
        for job in self._table.jobs.in_states("running"):
            if is_replica(job) and job.result and job.id != but and request_of(job).name == name:
                await self._table.move(job.id, lambda now: advance(now, "supersede", why=why) if now.state == "running" else now)

    async def _fail(self, job: JobRecord, fault: Fault) -> None:
        body = fault.body()
        await self._table.move(job.id, lambda now: _given_up(now, body) if _same(now, job) else now)
        try:
            await self._turn_back(job, f"job {job.id} failed: {fault.message}")
        except Fault as second:
            log.error("what was begun by %s can't be turned back: %s", job.id, second)

    async def _turn_back(self, job: JobRecord, why: str) -> None:
        """Have the kernel turn the job's swap back if it is still under way, and wait until it has."""
        attempt = self._table.attempts.get(request_of(job).name)
        while attempt is not None and (attempt.job, attempt.epoch) == (job.id, job.epoch):
            system = await self._cluster.system(PATIENCE_S)
            swap = swap_of(attempt.pool, system)
            if swap is None and any(p.pool == attempt.pool for p in system.pools) and not is_routed(attempt.pool, system):
                await self._bus.call(Kernel.stop_pool, PoolName(attempt.pool), timeout_s=10.0, patience_s=PATIENCE_S)  # on trial
            if swap is None or swap.phase not in PENDING:
                return
            try:
                await self._bus.call(Kernel.rollback, RollbackRequest(swap.pool, why), timeout_s=10.0, patience_s=PATIENCE_S)
            except ClientFault as fault:  # over by now, or so young that its pool is not there: the next look tells
                log.info("swap of %s: %s", swap.pool, fault.message)
            await self.look()


def _same(now: JobRecord, job: JobRecord) -> bool:
    return now.epoch == job.epoch and now.state in HOLDING


def _mine(now: JobRecord, job: JobRecord) -> JobRecord:
    if not _same(now, job):
        raise ClientFault("stale_epoch", f"{job.id} is {now.state} at epoch {now.epoch}, not {job.epoch}")
    return now


def _given_up(now: JobRecord, fault: FaultBody) -> JobRecord:
    """A model that was worse than the one before is as bad the next time; everything else may be tried again."""
    if fault.code in ("rolled_back", "poor_quality"):
        return advance(now, "exhaust", attempt=now.attempt + 1, fault=fault, why=fault.message)
    return failed(now, fault)


def _newer(old: Deployment) -> Deployment:
    raise ClientFault("stale_generation", f"{old.name} is at generation {old.generation} by now")
