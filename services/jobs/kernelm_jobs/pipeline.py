"""Runs: stages become jobs when what they refer to is known, until all are done or one has failed.

One task advances all runs. What it does is decided from the records alone, so it can be repeated at any time.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import suppress

import msgspec

from kernelm_contracts.jobs import JobRecord, JobSpec, RunFinished, RunRecord, RunSpec, RunView, StageSpec
from kernelm_jobs.dispatch import Dispatcher
from kernelm_jobs.intake import Intake
from kernelm_jobs.runs import is_complete, outcome, ready_stages, replaced, same_content, validate
from kernelm_jobs.states import LIVE
from kernelm_jobs.table import Table
from kernelm_sdk import tracing
from kernelm_sdk.errors import ClientFault, Fault, FaultBody

log = logging.getLogger("kernelm.jobs")
AGAIN_S = 1.0  # until a run that could not be advanced is tried again
FRAME_S, HEARTBEAT_S = 0.2, 5.0  # between two views of a run, at least and at most


class Pipelines:
    """Takes runs, advances them, shows them."""

    def __init__(self, table: Table, intake: Intake, dispatcher: Dispatcher) -> None:
        self._table, self._intake, self._dispatcher = table, intake, dispatcher
        self._dirty: set[str] = set()  # runs to look at
        self._wake = asyncio.Event()
        self._followers: dict[str, set[asyncio.Event]] = {}
        self._submitting = asyncio.Lock()
        table.listeners.append(self._changed)

    def recover(self) -> None:
        """After a restart: look at every run that is not over."""
        self._touch(*(run.id for run in self._table.runs.values() if run.state == "running"))

    def _touch(self, *ids: str) -> None:
        self._dirty.update(ids)
        self._wake.set()
        for id in ids:
            for follower in self._followers.get(id, ()):
                follower.set()

    def _changed(self, job: JobRecord) -> None:
        if job.spec.run:
            self._touch(job.spec.run)

    # ---- runs ----

    async def submit(self, spec: RunSpec) -> RunRecord:
        """A new run; the one under way if it is of the same content. ClientFault "invalid" before anything starts."""
        validate(spec)
        async with self._submitting:
            mine = [run for run in self._table.runs.values() if run.spec.name == spec.name]
            for run in mine:
                if run.state == "running" and same_content(run.spec, spec):
                    return run
            number = 1 + max((int(run.id.rpartition("-")[2]) for run in mine), default=0)
            while True:
                run = RunRecord(f"{spec.name}-{number}", spec, submitted=time.time(), trace=tracing.parent())
                if await self._table.runs.create(run.id, run):
                    self._touch(run.id)
                    return run
                number += 1

    async def cancel(self, id: str, why: str) -> RunRecord:
        """Cancel a run and its jobs; a run that is over stays as it is, and so does what serves."""
        return await self._finish(id, "cancelled", None, why)

    async def run(self) -> None:
        """Advance runs for ever."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            again = False
            for id in sorted(self._dirty):
                self._dirty.discard(id)
                try:
                    await self._advance(id)
                except Fault as fault:  # the kernel, the store or the broker is away
                    log.warning("run %s can't be advanced yet: %s", id, fault)
                    self._dirty.add(id)
                    again = True
            if again:
                asyncio.get_running_loop().call_later(AGAIN_S, self._wake.set)

    async def _advance(self, id: str) -> None:
        run = self._table.runs.need(id)
        if run.state != "running":
            return
        jobs = {stage: self._table.jobs.need(job) for stage, job in run.jobs.items()}
        state, fault = outcome(run, jobs)
        if state != "running":
            await self._finish(id, state, fault, f"run {id} is {state}")
            return
        for stage in ready_stages(run, jobs):
            try:
                await self._start(run, stage, jobs)
            except ClientFault as refusal:
                body = msgspec.structs.replace(refusal.body(), message=f"stage {stage.name!r}: {refusal.message}")
                await self._finish(id, "failed", body, f"run {id} has failed")
                return

    async def _start(self, run: RunRecord, stage: StageSpec, jobs: dict[str, JobRecord]) -> None:
        request = replaced(stage.with_, {name: job.result for name, job in jobs.items()})
        spec = msgspec.structs.replace(spec_of(run.spec, stage), request=request, run=run.id)
        job = await self._intake.submit_stage(spec, f"{run.id}-{stage.name}", run.trace)

        def note(now: RunRecord) -> RunRecord:
            return msgspec.structs.replace(now, jobs={**now.jobs, stage.name: job.id})

        await self._table.runs.update(run.id, note)
        self._touch(run.id)

    async def _finish(self, id: str, state: str, fault: FaultBody | None, why: str) -> RunRecord:
        """End a run: its record first, then what is left of its jobs."""

        def change(now: RunRecord) -> RunRecord:
            over = now.state != "running"
            return now if over else msgspec.structs.replace(now, state=state, fault=fault, finished=time.time())

        before, after = await self._table.runs.update(id, change)
        if after is not before:
            took = after.finished - after.submitted
            self._table.publish(RunFinished(run=id, name=after.spec.name, state=state, took_s=took))
            for job in self._table.jobs.in_states(*LIVE):
                if job.spec.run == id and not is_complete(job):
                    await self._dispatcher.cancel(job.id, why)
            self._touch(id)
        return after

    # ---- views ----

    def view(self, id: str) -> RunView:
        """A run with its jobs, in the order of the stages, children behind their parent."""
        run = self._table.runs.need(id)
        shown: list[JobRecord] = []

        def show(job: JobRecord) -> None:
            shown.append(job)
            for child in sorted(self._table.jobs.children(job.id), key=lambda j: (j.submitted, j.id)):
                show(child)

        for stage in run.spec.stage:
            if (name := run.jobs.get(stage.name)) and (mine := self._table.jobs.get(name)):
                show(mine)
        return RunView(run, tuple(shown))

    async def follow(self, id: str) -> AsyncIterator[RunView]:
        """The view at once, after every change (at most every FRAME_S), at least every HEARTBEAT_S; ends with the run."""
        changed = asyncio.Event()
        self._followers.setdefault(id, set()).add(changed)
        try:
            while True:
                changed.clear()
                view = self.view(id)
                yield view
                if view.run.state != "running":
                    return
                await asyncio.sleep(FRAME_S)  # the rate limit
                with suppress(TimeoutError):
                    async with asyncio.timeout(HEARTBEAT_S - FRAME_S):
                        await changed.wait()
        finally:
            self._followers[id].discard(changed)
            if not self._followers[id]:
                del self._followers[id]


def spec_of(run: RunSpec, stage: StageSpec) -> JobSpec:
    """The job of a stage, with its references to other stages as they are."""
    return JobSpec(stage.name, stage.uses, stage.with_, stage.resources, stage.plugin, run.tenant, run.priority, stage.attempts,
                   preemptible=stage.preemptible, deadline=stage.deadline, estimate_s=stage.estimate_s,
                   most=stage.most, gang=stage.gang)  # fmt: skip
