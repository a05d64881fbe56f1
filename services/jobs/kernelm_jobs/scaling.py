"""Replicas of deployments: their load is measured, and what the scheduler decides about their number and place is carried out.

The number that is wanted is on record (`Deployment.replicas`) before anything is begun; what follows from it (`_settle`) compares
the record with the kernel's state and can be repeated at any time, so whoever was killed in the middle goes on with it.

To zero: first the route of the model moves to this service, then the pool is scaled to nothing, each instance drained, so no call
is lost. From then on a call comes here (`absent`): the caller is told at once that the model starts (`starting`, 503, with
`retry_after_s`), and the next round of the scheduler sees the call as load. When an instance is ready the route moves back.

Elsewhere: a deployment whose node is gone (`holdings.stranded`) holds nothing any more, its calls are told so by this service, and
the scheduler is shown that it has no replica and needs as many as before. Where it decides on another node, that is on record
before the pool is moved there, under its own name: the generation stays, and the kernel stops what would run of it anywhere else.
Until then it waits, and the record says for what; where its node comes back first, it goes on there. The same goes for one that
does not get ready where it was decided: it is stopped there, and the node is avoided for a while (`Deployment.avoid`).
"""

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import NoReturn

from msgspec import structs

from kernelm_contracts.deployments import WAITS, Avoided, Deployment
from kernelm_contracts.jobs import JobRecord, ModelScaled
from kernelm_contracts.scheduler import Decision, ModelState, Share
from kernelm_jobs.cluster import Cluster
from kernelm_jobs.deploy import Deployer
from kernelm_jobs.deployment import answers, bounds, has_ready, is_replica, request_of, several
from kernelm_jobs.holdings import given_up, missed, named, places, serving, size, spread, stranded
from kernelm_jobs.load import Gauge, Load
from kernelm_jobs.placing import Pools, fits, on_its_nodes
from kernelm_jobs.rounds import MODEL
from kernelm_jobs.routing import canaries, failing, pool_in, quarantine, route_in, shares, swap_in
from kernelm_jobs.settings import Settings
from kernelm_jobs.states import HOLDING
from kernelm_jobs.table import Table
from kernelm_sdk.bus import Bus
from kernelm_sdk.errors import ClientFault, Fault, KernelFault
from kernelm_sdk.system import Empty, Lifecycle, Probe, SystemState

log = logging.getLogger("kernelm.jobs")
PATIENCE_S = 30.0  # for a kernel that restarts
START_S = 3.0  # until a new replica answers, before one was measured


class Scaling:
    """Knows the load of all deployments, and makes them as large as was decided."""

    def __init__(self, bus: Bus, table: Table, cluster: Cluster, deployer: Deployer, settings: Settings) -> None:
        self._bus, self._table, self._cluster, self._deployer, self._settings = bus, table, cluster, deployer, settings
        self._pools = Pools(bus, table, cluster)
        self._gauges: dict[str, Gauge] = {}
        self._loads: dict[str, Load] = {}
        self._start_s: dict[str, float] = {}  # deployment -> how long its last start took
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._stranded: dict[str, str] = {}  # deployment without a place -> what has become of its node
        self._reduced: dict[str, str] = {}  # deployment that has lost a part of its replicas -> what has become of their node
        self._late: dict[str, str] = {}  # deployment that is waited for -> why
        self._canaries: dict[str, int] = {}  # deployment -> percent of its calls that go to what shall replace it
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
                self._canaries = canaries(system)
                deployments = [await self._without_failing(each, system) for each in deployments]
                await self._measure(scaled := self.scaled, system)
            except Fault as fault:  # the kernel or the broker is away: nothing is known, so nothing changes
                log.warning("deployments can't be looked after: %s", fault.message)
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
        changing, found, self._stranded, self._reduced = self._changing(), [], {}, {}
        for deployment in self._table.deployments.values():
            job = self._table.jobs.get(deployment.job)
            if job is not None and job.state in HOLDING and job.result:
                wanted = places(deployment, job)
                lost = missed(deployment, wanted, system)
                if lost:
                    gone = self._reduced if len(lost) < len(wanted) else self._stranded
                    gone[deployment.name] = "; ".join(lost.values())
                left = tuple(Share(node, count) for node, count in wanted.items() if node not in lost)
                found.append(self._state(deployment, job, deployment.name in changing, left))
        return found

    def _state(self, deployment: Deployment, job: JobRecord, changing: bool, allocation: tuple[Share, ...]) -> ModelState:
        request, load = request_of(job), self._loads.get(deployment.name, Load())
        low, high = bounds(request, deployment.replicas, changing)
        if (replicas := size(allocation)) < deployment.replicas:  # some have lost their node: it is to be as large as it was again
            low, high = max(low, deployment.replicas), max(high, deployment.replicas)
        return ModelState(deployment.name, job.spec.tenant, job.spec.resources, (MODEL + deployment.name,), deployment.artifact,
                          replicas, allocation, low, high, round(load.arrivals_per_s, 3), load.queue,
                          round(load.rate_per_s, 3), 1, load.latency_ms, request.objective_ms, round(load.idle_s, 1),
                          self._start_s.get(deployment.name, START_S), deployment.scaled or deployment.when, job.spec.priority,
                          zero_after_s=request.idle_s)  # fmt: skip

    # ---- a call while there is no instance ----

    def absent(self, model: str, caller: str) -> Fault:
        """What a call is told that was routed here, and the model is wanted again."""
        deployment = self._table.deployments.get(model)
        if deployment is None:
            return ClientFault("unknown_model", f"there is no deployment {model!r}", "`kernelm model list` shows what is deployed")
        after_s = self._start_s.get(model, START_S)
        if deployment.replicas:
            waits = deployment.why if deployment.waits else self._stranded.get(model)
            why = waits or self._late.get(model) or "an instance is being started"
            remedy = "call again: callers with patience do so"
            if share := self._canaries.get(model):
                why += f"; {share} % of the calls go to its canary, and no more before it is promoted"
                remedy += f"; `kernelm model promote {model}` gives the canary all calls now"
            return KernelFault("starting", f"{model} has no instance now: {why}", remedy, retriable=True, retry_after_s=after_s)
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
        where, lost = spread(decision.allocation), self._stranded.pop(decision.job, "")
        replicas = sum(where.values())
        why = "; ".join(filter(None, (lost, self._reduced.pop(decision.job, ""), decision.reason)))

        def change(now: Deployment) -> Deployment:
            if now.spread == where and not given_up(now):
                return now
            at = now.node if now.node in where or not where else max(where, key=lambda node: where[node])
            avoid = {name: entry for name, entry in now.avoid.items() if name not in where and entry.until > time.time()}
            return structs.replace(now, replicas=replicas, node=at, places=several(where), scaled=time.time(), why=why, avoid=avoid)

        before, after = await self._table.deployments.update(decision.job, change)
        if after is not before:
            log.info("%s goes from %d to %d replicas: %s", after.name, 0 if lost else before.replicas, replicas, why)
            if not where.keys() <= before.spread.keys() | {before.node} or given_up(before):
                await self._say(after, f"moves to {named(where)}: {why}", decision.allocation)
            self._scaled(after, replicas, 0 if lost else before.replicas, why)
            self._begin(after.name)

    async def explain(self, reasons: Mapping[str, str], otherwise: str = f"{WAITS}the scheduler has no place for it") -> None:
        """Put on record for what those wait that lost their node, and found no place in this round."""
        for name, lost in list(self._stranded.items()):
            if (found := self._table.deployments.get(name)) is not None:
                reason = reasons.get(name, otherwise).removeprefix(WAITS)
                why = WAITS + (f"{lost}; elsewhere: {reason}" if given_up(found) else f"{reason}; {lost}")
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
            return structs.replace(new, node=deployment.node, allocation=allocation) if allocation else new

        job = self._table.jobs.get(deployment.job)
        if job is not None and (job.why != why or allocation):
            await self._table.move_all({job.id: lambda now: change(now) if now.state == "running" else now})

    def _scaled(self, deployment: Deployment, replicas: int, was: int, why: str) -> None:
        """Tell everybody."""
        job = self._table.jobs.need(deployment.job)
        self._table.publish(ModelScaled(model=deployment.name, replicas=replicas, was=was, why=why, tenant=job.spec.tenant,
                                        node=", ".join(deployment.spread), cpu=job.spec.resources.cpu))  # fmt: skip

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
        """Why a deployment has no place; "" where it has one."""
        job = self._table.jobs.get(deployment.job)
        return stranded(deployment, places(deployment, job), system) if job is not None else ""

    def _places(self, deployment: Deployment) -> dict[str, int]:
        return places(deployment, self._table.jobs.need(deployment.job))

    def _changing(self) -> set[str]:
        """The deployments that another model is to replace."""
        jobs = self._table.jobs.in_states(*HOLDING)
        return {request_of(job).name for job in jobs if is_replica(job) and not job.result}

    def _busy(self, name: str, system: SystemState) -> bool:
        """Whether another model is replacing it now. That may take long, as a canary that is watched."""
        replaced = self._deployer.alone(name).locked() and name in self._changing()
        return replaced or swap_in(name, system) is not None

    def _settled(self, deployment: Deployment, system: SystemState) -> bool:
        """Whether pool and route are as the record says, and the record of its job tells how it is."""
        spec, lost = pool_in(deployment, system), self._lost(deployment, system)
        if spec is None or spec.parked:
            return True
        to = self._bus.user if lost or not deployment.replicas else deployment.pool
        wanted, route = shares(deployment, swap_in(deployment.name, system), to), route_in(deployment.name, system)
        routed = not wanted or route in ((), wanted)
        there = on_its_nodes(spec, deployment) and routed and (bool(lost) or not deployment.waits)  # else it waits no more
        if self._busy(deployment.name, system):  # number and all else when that is over: the next look tells
            return there and not (given_up(deployment) and spec.instances)
        return there and fits(spec, deployment) and (bool(lost) or self._told(deployment))

    def _told(self, deployment: Deployment) -> bool:
        job = self._table.jobs.get(deployment.job)
        return job is None or job.state != "running" or job.why == answers(deployment.name, deployment.generation)

    async def _settle(self, name: str) -> None:
        """Make pool and route what the record says. While a replacement of the model is under way only what can't wait: the place,
        and what callers are told while there is none."""
        deployment, system = self._table.deployments.get(name), await self._cluster.system(PATIENCE_S)
        if deployment is not None and self._busy(name, system):
            if not self._settled(deployment, system) and not await self._no_place(deployment, system):
                moved = await self._pools.move(deployment, system) and not has_ready(deployment.pool, system)
                if moved or self._bus.user in [d.pool for d in route_in(name, system)]:
                    await self._arrive(deployment, system)
                await self._tell(deployment)
            return
        async with self._deployer.alone(name):
            deployment, system = self._table.deployments.get(name), await self._cluster.system(PATIENCE_S)
            if deployment is None:
                return  # it was taken away meanwhile
            spec = pool_in(deployment, system)
            if spec is None or self._settled(deployment, system) or await self._no_place(deployment, system):
                return
            if deployment.replicas == 0:
                await self._pools.share(deployment, self._bus.user, "no calls: the next one starts an instance")
                await self._pools.resize(spec, 0)
            else:
                moved = await self._pools.move(deployment, system)
                if not moved:
                    await self._pools.fit(spec, deployment)
                waits = moved and not has_ready(deployment.pool, system)
                if waits or route_in(name, system) != shares(deployment, None, deployment.pool):
                    await self._arrive(deployment, system)
            await self._tell(deployment)

    async def _no_place(self, deployment: Deployment, system: SystemState) -> bool:
        """Where it has no place, have callers told so, and nothing run on a node that it was given up on; whether that is so."""
        spec, lost = pool_in(deployment, system), self._lost(deployment, system)
        if not lost or spec is None:
            return False
        await self._pools.share(deployment, self._bus.user, lost)
        if given_up(deployment) and spec.instances:
            await self._pools.resize(spec, 0)
        self._scaled(deployment, 0, deployment.replicas, lost)
        return True

    async def _arrive(self, deployment: Deployment, system: SystemState) -> None:
        """Have its calls answered by its pool as soon as that can, and told for what they wait until then."""
        begun, name = time.monotonic(), deployment.name
        if not has_ready(deployment.pool, system):
            await self._pools.share(deployment, self._bus.user, self._late.get(name) or deployment.why)
        await self._ready(deployment)
        self._late.pop(name, None)
        self._start_s[name] = round(time.monotonic() - begun, 1)
        await self._pools.share(deployment, deployment.pool, self._since(deployment))

    def _since(self, deployment: Deployment) -> str:
        """Why it is as it is, now that it does not wait."""
        if not deployment.waits:
            return deployment.why
        nodes = self._places(deployment)
        return f"node {' or '.join(nodes)} is there again"  # before another one had room

    async def _tell(self, deployment: Deployment) -> None:
        """Put on record that it answers, or would if it were called."""
        if (why := self._since(deployment)) != deployment.why:
            await self._table.deployments.update(deployment.name, lambda now: structs.replace(now, why=why)
                                                 if now.why == deployment.why else now)  # fmt: skip
            self._scaled(deployment, deployment.replicas, 0, why)
        await self._say(deployment, answers(deployment.name, deployment.generation))

    async def _ready(self, deployment: Deployment) -> None:
        """Until an instance is ready; KernelFault "not_ready" where none will be, or none was within `deploy_s`."""
        until = time.monotonic() + self._settings.deploy_s
        while not has_ready(deployment.pool, system := await self._cluster.system(PATIENCE_S)):
            now = self._table.deployments.get(deployment.name)
            if now is None or (now.pool, now.node) != (deployment.pool, deployment.node) or self._lost(now, system):
                raise KernelFault("not_ready", f"{deployment.pool} has lost its place before it was ready", retriable=True)
            if why := quarantine(deployment.pool, system):
                await self._give_up(deployment, why)
            if time.monotonic() > until:
                await self._too_late(deployment, system)
            await self._deployer.look()

    async def _too_late(self, deployment: Deployment, system: SystemState) -> NoReturn:
        """It may only be slow: it goes on where no other node could have it. KernelFault "not_ready"."""
        why = f"no instance was ready within {self._settings.deploy_s:g} s"
        nodes = self._places(deployment)
        if any(r.node not in nodes and deployment.plugin in r.plugins for r in await self._cluster.reports(system)):
            await self._give_up(deployment, why)
        self._late[deployment.name] = why = f"{why}, and no other node has {deployment.plugin}: it is waited for"
        await self._say(deployment, what := f"{named(nodes)}: {why}")
        raise KernelFault("not_ready", f"{deployment.pool} on {what}", "see the log of its instances", retriable=True)

    async def _give_up(self, deployment: Deployment, why: str) -> NoReturn:
        """Put on record that its nodes are avoided for a while: it has no place now. KernelFault "not_ready"."""
        nodes = self._places(deployment)
        await self._avoid(deployment, nodes, nodes, why)
        raise KernelFault("not_ready", f"{deployment.pool} is given up on {named(nodes)}: {why}", "see the log of its instances",
                          retriable=True)  # fmt: skip

    async def _without_failing(self, deployment: Deployment, system: SystemState) -> Deployment:
        """The deployment, without the nodes where its replicas have ended so often that the kernel starts no more of them."""
        if (job := self._table.jobs.get(deployment.job)) is None:
            return deployment
        nodes, why = failing(deployment, where := places(deployment, job), system)
        return await self._avoid(deployment, where, nodes, why) if nodes else deployment

    async def _avoid(self, deployment: Deployment, where: Mapping[str, int], nodes: Collection[str], why: str) -> Deployment:
        """Put on record that of the nodes `where` it is to be `nodes` are avoided for a while. It goes on with the replicas on the
        others, if there are any, and the scheduler decides where the missing ones go."""
        entry = Avoided(time.time() + self._settings.avoid_s, why)
        left = {node: count for node, count in where.items() if node not in nodes}

        def change(now: Deployment) -> Deployment:
            if (now.pool, now.node) != (deployment.pool, deployment.node) or (left and now.spread != deployment.spread):
                return now
            new = structs.replace(now, node=now.node or next(iter(where)), avoid=now.avoid | dict.fromkeys(nodes, entry))
            if not left:  # what it is to have again, and where it was
                return new
            return structs.replace(new, node=next(iter(left)), replicas=sum(left.values()), places=several(left),
                                   why=f"{named(nodes)}: {why}")  # fmt: skip

        before, after = await self._table.deployments.update(deployment.name, change)
        if after.replicas < before.replicas:
            self._scaled(after, after.replicas, before.replicas, after.why)
        self.wake()
        return after
