"""The service: `jobs/1` and `work/1` on the bus, over the parts that do the work."""

import asyncio
import heapq
import logging
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from pathlib import Path
from typing import Any

import msgspec

from kernelm_contracts.deployments import Deployment, RollbackDeployment, Undeploy
from kernelm_contracts.jobs import (
    JobList,
    JobName,
    JobQuery,
    JobRecord,
    JobSpec,
    Outlook,
    Plan,
    RunName,
    RunRecord,
    RunSpec,
    RunView,
)
from kernelm_contracts.shadows import Compared, Shadow, ShadowRequest
from kernelm_contracts.usage import UsageQuery, UsageReport
from kernelm_jobs.cluster import Cluster
from kernelm_jobs.deploy import Deployer
from kernelm_jobs.dispatch import Dispatcher
from kernelm_jobs.intake import Intake
from kernelm_jobs.news import News
from kernelm_jobs.outlook import Outlooks
from kernelm_jobs.passing import Passing
from kernelm_jobs.pipeline import Pipelines
from kernelm_jobs.reports import Reports
from kernelm_jobs.scaling import Scaling
from kernelm_jobs.settings import read_settings
from kernelm_jobs.shadows import Shadows
from kernelm_jobs.states import FINAL
from kernelm_jobs.table import Table
from kernelm_jobs.usage import Accounts
from kernelm_jobs.watch import Watch
from kernelm_sdk.bus import Bus
from kernelm_sdk.events import Received
from kernelm_sdk.system import Empty, InstanceChanged, Report, Used

log = logging.getLogger("kernelm.jobs")
REPLY_BYTES = 900_000  # a message holds 1 MB
AGAIN_S = 1.0


class JobsService:
    """The job table of one system. Everything durable is in KV; a new instance goes on where the last one stopped."""

    def __init__(self, bus: Bus, home: Path) -> None:
        settings = read_settings(home / "jobs.toml")
        self._bus = bus
        self.table = Table(bus)
        self.cluster = Cluster(bus)
        self.deployer = Deployer(bus, self.table, self.cluster, settings.deploy_s)
        self.scaling = Scaling(bus, self.table, self.cluster, self.deployer, settings)
        self.absent = self.scaling.absent  # calls of models that have no instance are routed here
        self.dispatcher = Dispatcher(bus, self.table, self.cluster, self.deployer, self.scaling, settings)
        self.outlooks = Outlooks(bus, self.table, self.cluster, self.dispatcher)
        self.shadows = Shadows(bus, self.table)
        self.accounts = Accounts(bus, self.table, self.cluster, settings)
        self.intake = Intake(bus, self.table, self.cluster, self.accounts)
        self.pipelines = Pipelines(self.table, self.intake, self.dispatcher)
        self.reports = Reports(self.table, self.intake, self.dispatcher, Passing(bus, self.table.jobs))
        self.watch = Watch(bus, self.table, self.cluster, self.dispatcher, settings)
        self.news = News(self.table)
        self.table.listeners.append(self._orphans)
        self._tasks: list[asyncio.Task[None]] = []
        self._ended_parents: asyncio.Queue[JobRecord] = asyncio.Queue()

    async def on_start(self) -> None:
        """Read the records and go on with what was under way."""
        await self.table.load()
        await self.accounts.load()
        await self.shadows.load()
        await self._bus.follow(self._instance_event, "evt.plugin.state.kernel")  # of anybody else it would be a lie
        await self._bus.follow(self._swap_event, "evt.swap.phase.*")
        self._bus.reconnected.append(self._reconnected)
        await self.deployer.recover()
        self.scaling.recover()
        self.dispatcher.recover()
        self.pipelines.recover()
        for job in self.table.jobs.values():
            self._orphans(job)
        loops = (self.table.run, self.dispatcher.run, self.pipelines.run, self.watch.run, self.scaling.run,
                 self.accounts.run, self._cancel_orphans)
        self._tasks = [asyncio.create_task(_for_ever(loop)) for loop in loops]

    async def on_stop(self) -> None:
        """Stop deciding, let the events out. Jobs go on: their instances repeat their reports until a new service answers."""
        publisher, *others = self._tasks
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await self.dispatcher.stop()
        await self.scaling.stop()
        await self.deployer.stop()
        await self.table.flush(5.0)
        publisher.cancel()
        await asyncio.gather(publisher, return_exceptions=True)

    async def _reconnected(self) -> None:
        self.dispatcher.wake()

    async def _instance_event(self, received: Received) -> None:
        if isinstance(event := received.event, InstanceChanged):
            self.deployer.changed()
            self.dispatcher.wake()
            await self.watch.instance_changed(event)

    async def _swap_event(self, received: Received) -> None:
        self.deployer.changed()

    def _orphans(self, job: JobRecord) -> None:
        if job.state in FINAL:
            self._ended_parents.put_nowait(job)

    async def _cancel_orphans(self) -> None:
        while True:
            parent = await self._ended_parents.get()
            await self.dispatcher.cancel_children(parent.id, f"its parent {parent.id} is {parent.state}")

    # ---- jobs/1 ----

    async def submit_run(self, request: RunSpec, call: Any) -> RunRecord:
        self.accounts.require(request.tenant)
        return await self.pipelines.submit(request)

    async def get_run(self, request: RunName, call: Any) -> RunView:
        return self.pipelines.view(request.id)

    async def follow_run(self, request: RunName, call: Any) -> AsyncIterator[RunView]:
        async for view in self.pipelines.follow(request.id):
            yield view

    async def cancel_run(self, request: RunName, call: Any) -> RunRecord:
        return await self.pipelines.cancel(request.id, f"cancelled by {call.caller}")

    async def submit(self, request: JobSpec, call: Any) -> JobRecord:
        return await self.intake.submit(request)

    async def get(self, request: JobName, call: Any) -> JobRecord:
        return self.table.jobs.need(request.id)

    async def find(self, request: JobQuery, call: Any) -> JobList:
        """The newest first; fewer than `limit` if a message can't hold them."""
        jobs: Iterable[JobRecord] = self.table.jobs.in_states(request.state) if request.state else self.table.jobs.values()
        if request.known:
            jobs = await self.news.of(request.known, request.wait_s)
        wanted = [job for job in jobs if request.state in ("", job.state) and request.run in ("", job.spec.run)
                  and request.tenant in ("", job.spec.tenant)]  # fmt: skip
        found: list[JobRecord] = []
        room = REPLY_BYTES
        for job in heapq.nsmallest(request.limit, wanted, key=lambda j: (-j.submitted, j.id)):
            room -= len(msgspec.json.encode(job))
            if room < 0:
                break
            found.append(job)
        return JobList(tuple(found), len(wanted))

    async def cancel(self, request: JobName, call: Any) -> JobRecord:
        return await self.dispatcher.cancel(request.id, f"cancelled by {call.caller}")

    async def why(self, request: JobName, call: Any) -> Outlook:
        return await self.outlooks.why(request.id)

    async def plan(self, request: RunSpec, call: Any) -> Plan:
        return await self.outlooks.plan(request)

    async def rollback(self, request: RollbackDeployment, call: Any) -> JobRecord:
        return await self.intake.submit(self.deployer.before(request))

    async def undeploy(self, request: Undeploy, call: Any) -> Deployment:
        self.shadows.require_none(request.name)
        return await self.deployer.undeploy(request.name, request.why or f"taken away by {call.caller}")

    async def shadow(self, request: ShadowRequest, call: Any) -> Shadow:
        return await self.shadows.set(request, call.caller)

    async def compared(self, request: Compared, call: Any) -> Empty:
        await self.shadows.add(request, call.caller)
        return Empty()

    async def usage(self, request: UsageQuery, call: Any) -> UsageReport:
        return self.accounts.report(request)

    # ---- work/1 ----

    async def report(self, request: Report, call: Any) -> Empty:
        await self.reports.report(request, call.caller)
        return Empty()

    async def used(self, request: Used, call: Any) -> Empty:
        await self.accounts.used(request, call.caller)
        return Empty()


async def _for_ever(loop: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Keep a loop going: one job that trips a bug (the log has it) must not stop the others' scheduling and liveness."""
    while True:
        try:
            await loop()
        except Exception:
            log.exception("%s failed and is started again", loop.__qualname__)
        await asyncio.sleep(AGAIN_S)
