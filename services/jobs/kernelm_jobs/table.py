"""The records of jobs, runs and deployments, and the events that tell of their changes."""

import asyncio
import logging
import time
from collections.abc import Callable, Mapping

import msgspec

from kernelm_contracts.deployments import Deployment
from kernelm_contracts.jobs import JobChanged, JobProgress, JobRecord, RunRecord
from kernelm_jobs.deployment import Attempt
from kernelm_jobs.holdings import shares_of, size
from kernelm_jobs.records import PATIENCE_S, JobRecords, Records, encode
from kernelm_jobs.states import FINAL, HOLDING
from kernelm_sdk.bus import Bus
from kernelm_sdk.errors import ClientFault, KernelFault
from kernelm_sdk.events import Event
from kernelm_sdk.system import Progress

log = logging.getLogger("kernelm.jobs")


class Table:
    """All records, and the events that tell of their changes, published in order by one task (`run`)."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self.jobs = JobRecords(bus.bucket("jobs", JobRecord), "job")
        self.runs: Records[RunRecord] = Records(bus.bucket("runs", RunRecord), "run")
        self.deployments: Records[Deployment] = Records(bus.bucket("deployments", Deployment), "model")
        self.attempts: Records[Attempt] = Records(bus.bucket("deployments", Attempt), "attempt")
        self.heard: dict[str, float] = {}  # job -> monotonic time of the last sign of it
        self.listeners: list[Callable[[JobRecord], None]] = []  # told of every change of a job, after it is on disk
        self._written: dict[str, float] = {}  # job -> monotonic time of the last progress on disk
        self._outbox: asyncio.Queue[Event | tuple[str, bytes]] = asyncio.Queue()

    async def load(self) -> None:
        """Read all records. What is under way counts as heard now: nobody could report while this service was away."""
        for records in (self.jobs, self.runs, self.deployments, self.attempts):
            await records.load()
        self.heard = {job.id: time.monotonic() for job in self.jobs.in_states(*HOLDING)}

    def deployment(self, name: str) -> Deployment:
        """ClientFault "unknown_model" where there is none."""
        if (found := self.deployments.get(name)) is None:
            known = ", ".join(sorted(d.name for d in self.deployments.values())) or "none"
            raise ClientFault("unknown_model", f"there is no deployment {name!r}", f"deployments: {known}")
        return found

    async def create(self, job: JobRecord) -> bool:
        """A new job; False if its id is taken."""
        created = await self.jobs.create(job.id, job)
        if created:
            self._announce(job)
        return created

    async def move(self, id: str, change: Callable[[JobRecord], JobRecord]) -> JobRecord:
        """Change a job by compare-and-set and tell everybody; the record after it."""
        before, after = await self.jobs.update(id, change)
        if after is not before:
            self.heard[id] = time.monotonic()
            if after.state != before.state:
                self._announce(after)
            else:
                self._tell(after)
        return after

    async def move_all(self, changes: Mapping[str, Callable[[JobRecord], JobRecord]]) -> dict[str, JobRecord]:
        """As `move` for many jobs, in atomic batches. A new reason is an event too."""
        pairs = await self.jobs.update_all(changes)
        for id, (before, after) in pairs.items():
            if after is before:
                continue
            if after.state != before.state:
                self.heard[id] = time.monotonic()
                self._announce(after)
            else:
                if after.why != before.why:
                    self._post(after)
                self._tell(after)
        return {id: after for id, (_, after) in pairs.items()}

    async def explain(self, reasons: Mapping[str, str]) -> None:
        """Put reasons on the records of waiting jobs, each with an event."""

        def because(why: str) -> Callable[[JobRecord], JobRecord]:
            return lambda job: msgspec.structs.replace(job, why=why) if job.state == "queued" and job.why != why else job

        await self.move_all({id: because(why) for id, why in reasons.items() if self.jobs.get(id)})

    async def progress(self, id: str, epoch: int, progress: Progress) -> None:
        """Show how far the owner of `epoch` got at once, and write and publish it at most once a second."""

        def change(stored: JobRecord) -> JobRecord:
            mine = stored.epoch == epoch and stored.state in HOLDING
            return msgspec.structs.replace(stored, progress=progress, heard=time.time()) if mine else stored

        now = time.monotonic()
        self.heard[id] = now
        if now - self._written.get(id, 0.0) < 1.0:
            job = change(self.jobs.need(id))
            self.jobs.remember(id, job)
            self._tell(job)
            return
        self._written[id] = now
        before, after = await self.jobs.update(id, change)
        if after is not before:
            self._tell(after)
            self._outbox.put_nowait(JobProgress(job=id, name=after.spec.name, run=after.spec.run, progress=progress))

    def publish(self, event: Event) -> None:
        """Publish behind everything that was published before."""
        self._outbox.put_nowait(event)

    def _announce(self, job: JobRecord) -> None:
        self._post(job)
        if job.state == "dead":
            self._outbox.put_nowait((f"dlq.{self._bus.user}.{job.id}", encode(job)))
        if job.state in FINAL:
            self.heard.pop(job.id, None)
            self._written.pop(job.id, None)
        self._tell(job)

    def _post(self, job: JobRecord) -> None:
        spec = job.spec
        cpu = spec.resources.cpu * size(shares_of(job)) if job.state in HOLDING else 0.0
        self._outbox.put_nowait(JobChanged(job=job.id, name=spec.name, run=spec.run, state=job.state, epoch=job.epoch, why=job.why,
                                           tenant=spec.tenant, node=job.node, cpu=cpu, uses=spec.uses))  # fmt: skip

    def _tell(self, job: JobRecord) -> None:
        for listener in self.listeners:
            listener(job)

    async def run(self) -> None:
        """Publish for ever what the changes said, in their order. The records are the truth: an event that was not yet
        out when this service died is lost, and nothing else with it."""
        while True:
            await self._send(await self._outbox.get())
            self._outbox.task_done()

    async def _send(self, item: Event | tuple[str, bytes]) -> None:
        while True:
            try:
                if isinstance(item, tuple):
                    await self._bus.append(*item, patience_s=PATIENCE_S)
                else:
                    await self._bus.publish(item, patience_s=PATIENCE_S)
                return
            except ClientFault as fault:  # refused for what it is: again would not help
                log.error("an event was refused and is dropped: %s; %r", fault, item)
                return
            except KernelFault as fault:
                log.error("an event can't be stored, and is tried again: %s", fault)
            await asyncio.sleep(1.0)

    async def flush(self, timeout_s: float) -> None:
        """Wait until everything is published; log what is left after `timeout_s`."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._outbox.join()
        except TimeoutError:
            log.error("%d events were not published in time", self._outbox.qsize() + 1)
