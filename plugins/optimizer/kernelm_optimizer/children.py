"""The jobs that a search submits and waits for."""

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec

from kernelm_contracts.jobs import JobName, JobQuery, JobRecord, Jobs, JobSpec
from kernelm_sdk.errors import ClientFault, Fault, KernelFault, PluginFault, from_body
from kernelm_sdk.plugin import Job
from kernelm_sdk.system import Resources

Req = TypeVar("Req", bound=msgspec.Struct)
Rep = TypeVar("Rep", bound=msgspec.Struct)
Seen = Callable[[Mapping[str, JobRecord]], Awaitable[None]]

ENDED = ("done", "dead", "cancelled")
FIRST_PAUSE_S = 0.05


@dataclass(frozen=True)
class Wait:
    """What a job waits for in the queue."""

    reason: str  # the scheduler's, "waits: ..."
    remedy: str = ""  # what would start it, where that is known

    @property
    def text(self) -> str:
        """Both in one sentence."""
        reason = self.reason or "it was queued"
        return f"{reason} (what would start it: {self.remedy})" if self.remedy else reason


class Children:
    """Submits jobs in the name of `parent` and waits for them; they are cancelled with it by the job table.

    `poll_max_s` is the longest pause between two looks; a job table that is away for up to `patience_s` is waited for.
    """

    def __init__(self, parent: Job, poll_max_s: float, patience_s: float) -> None:
        self.parent, self.poll_max_s, self.patience_s = parent, poll_max_s, patience_s
        self.waited: dict[str, Wait] = {}  # job that was given up -> what it waited for

    async def submit(self, name: str, uses: str, request: msgspec.Struct, resources: Resources,
                     preemptible: bool = False) -> JobRecord:  # fmt: skip
        """Submit a job; equal work that was done before comes back as done (`reused`)."""
        return await self._call(Jobs.submit, JobSpec(
            name=name, uses=uses, request=msgspec.to_builtins(request), resources=resources, preemptible=preemptible,
            parent=self.parent.id, run=self.parent.run_id))

    async def find(self, identifier: str) -> JobRecord | None:
        """The job, or None if the job table does not know it."""
        try:
            return await self._call(Jobs.get, JobName(identifier))
        except ClientFault as fault:
            if fault.code == "not_found":
                return None
            raise

    async def news(self, known: Mapping[str, float], wait_s: float) -> tuple[JobRecord, ...]:
        """Those of the jobs `known` (id -> `heard`) that are over or were heard of since; waits for the first up to `wait_s`."""
        return (await self._call(Jobs.find, JobQuery(limit=len(known), known=dict(known), wait_s=wait_s))).jobs

    async def ended(self, jobs: Mapping[str, str], seen: Seen, deadline: float = math.inf,
                    begin_by: float = math.inf, wait_s: float = 0.0) -> dict[str, JobRecord]:  # fmt: skip
        """Wait until all `jobs` (key -> id) have ended, and return their records.

        `seen` gets the records after every look. Those not at their end at `deadline` (of `time.monotonic`), and those that
        wait in the queue at `begin_by` or later and have done so for `wait_s`, also when they are there again, are given up;
        their record is then whatever the job table made of that.
        """
        queued: dict[str, float] = {}  # since when
        records: dict[str, JobRecord] = {}
        pause = FIRST_PAUSE_S
        while True:
            for key in [k for k in jobs if k not in records or records[k].state not in ENDED]:
                records[key] = await self._call(Jobs.get, JobName(jobs[key]))
            await seen(records)
            unfinished = [key for key, record in records.items() if record.state not in ENDED]
            if not unfinished:
                return records
            queued = {key: queued.get(key, time.monotonic()) for key in unfinished if records[key].state == "queued"}
            limits = {key: min(deadline, max(begin_by, queued[key] + wait_s) if key in queued else math.inf) for key in unfinished}
            if late := [key for key, limit in limits.items() if limit <= time.monotonic()]:
                records |= {key: await self.give_up(jobs[key]) for key in late}
                continue
            await asyncio.sleep(max(0.0, min(pause, *(limit - time.monotonic() for limit in limits.values()))))
            pause = min(pause * 1.5, self.poll_max_s)

    async def give_up(self, identifier: str) -> JobRecord:
        """Cancel a job for want of time; its record, as of `cancel`. What it waited for in the queue is in `waited` then."""
        record = await self._call(Jobs.get, JobName(identifier))
        if record.state == "queued":
            self.waited[identifier] = await self._wait_of(record)
        return await self.cancel(identifier)

    async def _wait_of(self, record: JobRecord) -> Wait:
        try:
            outlook = await self.parent.context.call(Jobs.why, JobName(record.id))
        except Fault as fault:  # the scheduler is away: its last word is on the record
            self.parent.context.log.warning("%s: what would start %s is not known: %s", self.parent.id, record.id, fault.message)
            return Wait(record.why)
        return Wait(outlook.reason or record.why, outlook.remedy)

    async def cancel(self, identifier: str) -> JobRecord:
        """Cancel a job; its record, also if it came to its end just before."""
        try:
            return await self._call(Jobs.cancel, JobName(identifier))
        except ClientFault:  # nothing left to cancel
            return await self._call(Jobs.get, JobName(identifier))

    async def _call(self, method: Callable[[Any, Req, Any], Coroutine[Any, Any, Rep]], request: Req) -> Rep:
        away_until = time.monotonic() + self.patience_s
        pause = FIRST_PAUSE_S
        while True:
            self.parent.raise_if_cancelled()
            try:
                return await self.parent.context.call(method, request)
            except Fault as fault:
                waitable = isinstance(fault, KernelFault) or fault.retriable
                if not waitable or time.monotonic() >= away_until:
                    raise
            await asyncio.sleep(pause)
            pause = min(pause * 1.5, self.poll_max_s)


def result_of(record: JobRecord, expected: type[Rep]) -> Rep:
    """What a job that has ended returned; its own fault, or a PluginFault that says why there is none."""
    if record.state != "done":
        raise from_body(record.fault) if record.fault else PluginFault(
            f"job_{record.state}", f"job {record.spec.name!r} ({record.id}) is {record.state}: {record.why or 'no reason given'}")
    try:
        return msgspec.convert(record.result, expected)
    except msgspec.ValidationError as error:
        raise PluginFault("invalid_result", f"result of job {record.spec.name!r} ({record.id}): {error}") from None


async def together(*work: Coroutine[Any, Any, None]) -> None:
    """Do all; when one fails the others are cancelled, and its fault is raised."""
    tasks = [asyncio.create_task(w) for w in work]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
