"""`work/1`: what instances report on their jobs. A report is believed only from the owner of the job's present epoch."""

import logging
import time

import msgspec

from kernelm_contracts.jobs import JobRecord
from kernelm_jobs.dispatch import Dispatcher
from kernelm_jobs.elastic import LEAST_S, is_elastic
from kernelm_jobs.holdings import instances_of, shares_of, size
from kernelm_jobs.intake import Intake
from kernelm_jobs.passing import Passing
from kernelm_jobs.runs import normalized, signature
from kernelm_jobs.states import HOLDING, advance, failed
from kernelm_jobs.table import Table
from kernelm_sdk.errors import ClientFault, PluginFault
from kernelm_sdk.system import Progress, Report

log = logging.getLogger("kernelm.jobs")


class Reports:
    """Writes reports into the records."""

    def __init__(self, table: Table, intake: Intake, dispatcher: Dispatcher, passing: Passing) -> None:
        self._table, self._intake, self._dispatcher, self._passing = table, intake, dispatcher, passing
        self._checkpoints: dict[str, tuple[int, list[str]]] = {}  # job -> epoch, its checkpoints in their order
        self._paces: dict[str, tuple[int, float, float]] = {}  # elastic job -> epoch, since when it is measured, the part done then
        self._rates: dict[str, float] = {}  # elastic job -> part of its work per second, since then
        table.listeners.append(self._changed)

    def _changed(self, job: JobRecord) -> None:
        if job.state not in HOLDING:
            for known in (self._checkpoints, self._paces, self._rates):
                known.pop(job.id, None)  # type: ignore[attr-defined]

    async def report(self, report: Report, caller: str) -> None:
        """Write one report; ClientFault "stale_epoch", with nothing changed, if the caller does not hold the job now."""
        job = self._table.jobs.need(report.job)
        if self._repeated(job, report, caller):
            if job.state == "done":
                await self._over(job)
            return
        self._fence(job, report, caller)
        if caller != job.instance:
            await self._of_follower(job, report, caller)
            return
        if job.state == "placed":
            job = await self._table.move(job.id, lambda now: advance(self._fence(now, report, caller), "accept"))
        if report.progress is not None:
            self._measure(job, report.progress)
            await self._table.progress(job.id, report.epoch, report.progress)
        if report.note:
            await self._table.move_all({job.id: lambda now: msgspec.structs.replace(
                self._fence(now, report, caller), why=report.note, left=report.left or now.left)})  # fmt: skip
        if report.address and job.gang:
            job = await self._table.move(job.id, lambda now: msgspec.structs.replace(
                self._fence(now, report, caller), meeting=report.address))  # fmt: skip
            self._dispatcher.spawn(self._dispatcher.muster(job))
        if report.checkpoint:
            await self._checkpoint(report, caller)
        if report.fault is not None:
            fault = report.fault
            self._dispatcher.hold(job.id)
            await self._table.move(job.id, lambda now: failed(self._fence(now, report, caller), fault))
            self._dispatcher.dissolve(job, fault.message)
        elif report.result is not None:
            await self._result(job, report, caller)

    def _fence(self, now: JobRecord, report: Report, caller: str) -> JobRecord:
        if now.epoch == report.epoch and now.state in HOLDING and caller in instances_of(now):
            return now
        raise ClientFault("stale_epoch", f"job {now.id} is {now.state} at epoch {now.epoch} of {now.instance or 'nobody'}; "
                          f"{caller} reports for epoch {report.epoch}", "stop working on it")  # fmt: skip

    async def _of_follower(self, job: JobRecord, report: Report, caller: str) -> None:
        """Of a gang rank 0 speaks; the others are heard only when they fail, and then it has failed for all."""
        if report.fault is not None:
            message = f"rank {job.gang.index(caller)} ({caller}): {report.fault.message}"
            fault = msgspec.structs.replace(report.fault, message=message)
            await self._dispatcher.fail(job, fault)

    def _measure(self, job: JobRecord, progress: Progress) -> None:
        """Note how fast an elastic job gets on with what it has now."""
        if is_elastic(job):
            now, part = time.monotonic(), progress.fraction
            epoch, begun, first = self._paces.get(job.id, (0, now, part))
            if epoch != job.epoch:
                begun, first = now, part
            self._paces[job.id] = job.epoch, begun, first
            if now - begun >= LEAST_S and part > first:
                self._rates[job.id] = (part - first) / (now - begun)

    def _repeated(self, now: JobRecord, report: Report, caller: str) -> bool:
        """Whether this is the last report again, whose answer was lost: then it is answered as before."""
        if now.epoch != report.epoch or now.instance != caller or now.state in HOLDING:
            return False
        if report.fault is not None:
            return now.state in ("queued", "dead") and now.fault == report.fault
        return now.state == "done" and report.result is not None and not report.checkpoint

    async def _checkpoint(self, report: Report, caller: str) -> None:
        before, told = "", False

        def change(now: JobRecord) -> JobRecord:  # again from the start where another has changed the job meanwhile
            nonlocal before, told
            now, before = self._fence(now, report, caller), ""
            if told := report.checkpoint in (now.checkpoint, *self._earlier(now)):
                return now  # perhaps late: it must not bring back an older one
            before = now.checkpoint
            rate = self._rates.get(now.id, 0.0)
            rates = now.rates | {str(size(shares_of(now))): rate} if rate else now.rates
            return msgspec.structs.replace(now, checkpoint=report.checkpoint, checkpointed=time.time(), rates=rates)

        job = await self._table.move(report.job, change)
        if not told:
            self._checkpoints[job.id] = job.epoch, [*self._earlier(job), report.checkpoint]
            self._rates.pop(job.id, None)
        if before:
            self._dispatcher.spawn(self._passing.forget(job, before))
        if job.stopping and report.result is None and job.checkpoint == report.checkpoint:
            self._dispatcher.spawn(self._dispatcher.make_room(job))  # behind the answer to this report

    def _earlier(self, job: JobRecord) -> list[str]:
        """The checkpoints of the job's present owner."""
        epoch, checkpoints = self._checkpoints.get(job.id, (0, []))
        return checkpoints if epoch == job.epoch else []

    async def _over(self, done: JobRecord) -> None:
        """Its result is on record. Again where the answer was lost: this service may have been killed before it came here."""
        await self._intake.keep(done)
        self._dispatcher.spawn(self._passing.end(done))

    async def _result(self, job: JobRecord, report: Report, caller: str) -> None:
        """A result that is none fails the attempt, and says so to the one who sent it."""
        try:
            result = normalized(report.result, signature(job.spec.uses)[1])
            done = await self._table.move(job.id, lambda now: advance(
                self._fence(now, report, caller), "finish", result=result, fault=None, why="",
                progress=Progress(1.0, "done", metrics=now.progress.metrics)))  # fmt: skip
        except msgspec.ValidationError as error:
            fault = PluginFault("invalid_result", f"result of {job.spec.uses} from {caller}: {error}", "the plugin has a bug")
        except ClientFault as refusal:
            if refusal.code != "too_large":
                raise
            fault = PluginFault("too_large", f"result of {job.spec.uses} from {caller}: {refusal.message}", refusal.remedy)
        else:
            await self._over(done)
            self._dispatcher.dissolve(job, "rank 0 is done")
            return
        await self._dispatcher.fail(job, fault.body())
        raise ClientFault(fault.code, fault.message, fault.remedy)
