"""Liveness: jobs whose instance is gone, has forgotten them, or makes no progress are taken away and queued again.

Three signs: the kernel's word on the instance (its lease), the instance's own word on its jobs (a probe), and the
deadline that the job's phase declared. A doubtful sign counts only when it is seen twice in a row.
"""

import asyncio
import logging
import time

from kernelm_contracts.jobs import JobRecord
from kernelm_jobs.cluster import Cluster
from kernelm_jobs.dispatch import Dispatcher
from kernelm_jobs.holdings import GONE, instances_of
from kernelm_jobs.settings import Settings
from kernelm_jobs.states import HOLDING
from kernelm_jobs.table import Table
from kernelm_sdk.bus import Bus
from kernelm_sdk.errors import Fault, FaultBody
from kernelm_sdk.system import Empty, InstanceChanged, InstanceName, Lifecycle, Node, Probe, SystemState

log = logging.getLogger("kernelm.jobs")


def lost(job: JobRecord, why: str) -> FaultBody:
    """The fault of a job whose instance is gone. Its last attempt is not promised another one."""
    remedy = "it goes on from its last checkpoint"
    if job.attempt + 1 >= job.spec.attempts:
        remedy = f"logs/{job.instance}.log in its node's home says more; mend it, and submit the same again to go on"
    return FaultBody("kernel", "lost", why, remedy, retriable=True)


class Watch:
    """Looks after every job that is in an instance's hands."""

    def __init__(self, bus: Bus, table: Table, cluster: Cluster, dispatcher: Dispatcher, settings: Settings) -> None:
        self._bus, self._table, self._cluster, self._dispatcher, self._settings = bus, table, cluster, dispatcher, settings
        self._doubts: set[tuple[str, int, str]] = set()  # job, epoch, sign: seen once so far
        self._probed = time.monotonic()

    async def run(self) -> None:
        """Look for ever, every `watch_every_s`."""
        while True:
            await asyncio.sleep(self._settings.watch_every_s)
            try:
                await self.look()
            except Fault as fault:  # the kernel or the broker is away: nothing is known, so nothing is taken away
                log.warning("jobs can't be watched: %s", fault.message)

    async def instance_changed(self, event: InstanceChanged) -> None:
        """The kernel's word that an instance is gone, at once."""
        for job in self._held():
            if event.state in GONE and event.instance in instances_of(job):
                await self._lost(job, f"{event.instance} {event.state}{': ' * bool(event.reason)}{event.reason}")

    def _held(self) -> list[JobRecord]:
        return [job for job in self._table.jobs.in_states(*HOLDING) if job.instance]

    async def look(self) -> None:
        """One look at everything that is under way."""
        for job in self._held():
            silent = time.monotonic() - self._table.heard.setdefault(job.id, time.monotonic())
            hangs = job.state == "running" and silent > job.progress.deadline_s
            if hangs and job.instance not in self._dispatcher.condemned:
                self._dispatcher.condemned.add(job.instance)
                self._dispatcher.spawn(self._take_away(job, silent))  # it may take its time; others are watched meanwhile
        held = self._held()
        if not held:
            return
        system = await self._cluster.system()
        probes = await self._probes({job.instance for job in held if job.state == "running"})
        for job in held:
            await self._judge(job, system, probes)

    async def _judge(self, job: JobRecord, system: SystemState, probes: dict[str, tuple[str, ...]]) -> None:
        instance = next((i for i in system.instances if i.id == job.instance), None)
        for follower in [i for i in system.instances if i.id in job.gang[1:] and i.state in GONE]:
            await self._lost(job, f"{follower.id} {follower.state}: {follower.reason}")
            return
        if instance is not None and instance.state in GONE:
            await self._lost(job, f"{instance.id} {instance.state}{': ' * bool(instance.reason)}{instance.reason}")
            return
        signs = [(instance is None, f"the kernel does not know {job.instance}")]
        if job.instance in probes and job.state == "running":
            signs.append((f"{job.id}/{job.epoch}" not in probes[job.instance], f"{job.instance} does not work on it any more"))
        for seen, why in signs:
            if self._twice(job, seen, why):
                await self._lost(job, why)
                return

    def _twice(self, job: JobRecord, seen: bool, why: str) -> bool:
        """Whether a sign was seen now and the last time that it was looked for."""
        key = (job.id, job.epoch, why)
        if seen and key not in self._doubts:
            self._doubts.add(key)
            return False
        self._doubts.discard(key)
        return seen

    async def _probes(self, instances: set[str]) -> dict[str, tuple[str, ...]]:
        """The jobs that each instance works on, of those that answer; nothing between two rounds of probes."""
        if time.monotonic() - self._probed < self._settings.probe_every_s:
            return {}
        self._probed = time.monotonic()

        async def ask(instance: str) -> tuple[str, tuple[str, ...]] | None:
            try:
                probe: Probe = await self._bus.call(Lifecycle.probe, Empty(), instance=instance, timeout_s=2.0)
                return instance, probe.jobs
            except Fault as fault:  # its lease tells whether it lives
                log.warning("%s does not answer a probe: %s", instance, fault.message)
                return None

        return dict(a for a in await asyncio.gather(*map(ask, instances)) if a)

    async def _lost(self, job: JobRecord, why: str) -> None:
        log.warning("job %s/%d is lost: %s", job.id, job.epoch, why)
        await self._dispatcher.fail(job, lost(job, why), why)

    async def _take_away(self, job: JobRecord, silent: float) -> None:
        """Fence first, then stop the instance: what hangs does not listen, and its thread can't be ended otherwise. It gets
        no more jobs meanwhile."""
        phase, deadline_s = job.progress.phase or "start", job.progress.deadline_s
        why = f"no progress for {silent:.0f} s in phase {phase!r}, which allowed {deadline_s:g} s"
        log.warning("job %s/%d is taken from %s: %s", job.id, job.epoch, job.instance, why)
        fault = FaultBody("plugin", "no_progress", why, "see the log of the instance", retriable=True)
        try:
            await self._dispatcher.fail(job, fault, why)
            await self._dispatcher.tell(job, why)
            await self._bus.call(Node.stop, InstanceName(job.instance), instance=f"node-{job.node}", timeout_s=30.0)
        except Fault as refusal:
            log.error("%s hangs and can't be stopped: %s", job.instance, refusal.message)
        finally:
            self._dispatcher.condemned.discard(job.instance)
