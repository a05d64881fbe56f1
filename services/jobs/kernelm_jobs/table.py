"""The records of jobs, runs and deployments: a cache in memory over compare-and-set writes to KV, which is the truth.

The cache is read from KV at the start, and a record again whenever a write finds that another writer was first.
"""

import asyncio
import contextlib
import logging
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Generic, TypeVar

import msgspec

from kernelm_contracts.jobs import Deployment, JobChanged, JobProgress, JobRecord, RunRecord
from kernelm_jobs.deployment import Attempt
from kernelm_jobs.holdings import shares_of, size
from kernelm_jobs.states import FINAL, HOLDING
from kernelm_sdk.bus import Bucket, Bus
from kernelm_sdk.errors import ClientFault, Fault, KernelFault
from kernelm_sdk.events import Event
from kernelm_sdk.system import Progress

log = logging.getLogger("kernelm.jobs")
T = TypeVar("T", bound=msgspec.Struct)
BATCH = 1000  # records that are written at once; the broker takes no more
PATIENCE_S = 30.0  # for a broker that restarts
encode = msgspec.json.Encoder().encode


class Records(Generic[T]):
    """Records of one kind under `<prefix>.<id>` in a bucket."""

    def __init__(self, bucket: Bucket[T], prefix: str) -> None:
        self._bucket, self._prefix = bucket, prefix
        self._cache: dict[str, tuple[T, int]] = {}  # id -> record, revision
        self._locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    async def load(self) -> None:
        """Forget the cache and read everything."""
        stored = await self._bucket.all(self._prefix)
        self._cache = {key.removeprefix(f"{self._prefix}."): entry for key, entry in stored.items()}

    def get(self, id: str) -> T | None:
        entry = self._cache.get(id)
        return entry[0] if entry else None

    def need(self, id: str) -> T:
        """The record; ClientFault "not_found" if there is none."""
        if (record := self.get(id)) is None:
            raise ClientFault("not_found", f"there is no {self._prefix} {id!r}", "see `kernelm jobs`")
        return record

    def values(self) -> Iterable[T]:
        return [record for record, _ in self._cache.values()]

    async def create(self, id: str, record: T) -> bool:
        """Write a record where there is none; False if there is one by now, which is then in the cache."""
        async with self._locks[id]:
            if id in self._cache:
                return False
            key = f"{self._prefix}.{id}"
            try:
                self._cache[id] = record, await self._bucket.put(key, record, 0, patience_s=PATIENCE_S)
                return True
            except ClientFault as fault:
                if fault.code != "conflict":
                    raise
            stored, revision = await self._bucket.get(key)
            if stored is None:
                raise KernelFault("storage", f"{key} was deleted by somebody else", retriable=True)
            self._cache[id] = stored, revision
            return encode(stored) == encode(record)  # our own write, whose answer was lost

    async def update(self, id: str, change: Callable[[T], T]) -> tuple[T, T]:
        """Write `change(record)`, again and again on the newest record until no other writer was first; (before, after).
        What `change` returns unchanged is not written; what it raises leaves everything as it was."""
        async with self._locks[id]:
            while True:
                before = self.need(id)
                after = change(before)
                if after is before:
                    return before, before
                key = f"{self._prefix}.{id}"
                try:
                    revision = await self._bucket.put(key, after, self._cache[id][1], patience_s=PATIENCE_S)
                    self._cache[id] = after, revision
                    return before, after
                except ClientFault as fault:
                    if fault.code != "conflict":
                        raise
                stored, revision = await self._bucket.get(key)
                if stored is None:
                    del self._cache[id]
                    continue
                self._cache[id] = stored, revision
                if encode(stored) == encode(after):  # our own write, whose answer was lost
                    return before, stored

    async def update_all(self, changes: Mapping[str, Callable[[T], T]]) -> dict[str, tuple[T, T]]:
        """As `update` for many, in atomic batches; (before, after) of each. Where another writer was first on any of them, or
        it is not known whether a batch was stored, its records are written one by one."""
        done: dict[str, tuple[T, T]] = {}
        ids = sorted(changes)
        for some in (ids[at : at + BATCH] for at in range(0, len(ids), BATCH)):
            try:
                done |= await self._store({id: changes[id] for id in some})
            except Fault as fault:
                if not fault.retriable:
                    raise
                log.warning("a batch of %d records is written one by one: %s", len(some), fault.message)
                done |= {id: await self.update(id, changes[id]) for id in some}
        return done

    async def _store(self, changes: Mapping[str, Callable[[T], T]]) -> dict[str, tuple[T, T]]:
        async with contextlib.AsyncExitStack() as stack:
            for id in sorted(changes):
                await stack.enter_async_context(self._locks[id])
            pairs = {id: (before := self.need(id), change(before)) for id, change in changes.items()}
            new = [(id, after) for id, (before, after) in pairs.items() if after is not before]
            records = [(f"{self._prefix}.{id}", after, self._cache[id][1]) for id, after in new]
            for (id, after), revision in zip(new, await self._bucket.put_all(records), strict=True):
                self._cache[id] = after, revision
            return pairs

    def remember(self, id: str, record: T) -> None:
        """Change the cache only: for news that is worth showing but not a write to disk."""
        if id in self._cache:
            self._cache[id] = record, self._cache[id][1]


class Table:
    """All records, and the events that tell of their changes, published in order by one task (`run`)."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self.jobs: Records[JobRecord] = Records(bus.bucket("jobs", JobRecord), "job")
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
        self.heard = {job.id: time.monotonic() for job in self.jobs.values() if job.state in HOLDING}

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
