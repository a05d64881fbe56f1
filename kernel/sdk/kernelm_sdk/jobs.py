"""The jobs that one instance works on: accepted at once, worked on in the background, reported on through `work/1`, every report
with the job's epoch. What they were granted of the processor is the instance's share while they last."""

import asyncio
import contextlib
import errno
import logging
from collections.abc import Callable
from typing import Any

import msgspec

from kernelm_sdk.bus import Bus
from kernelm_sdk.contract import Method
from kernelm_sdk.errors import ClientFault, Fault, FaultBody, KernelFault, PluginFault
from kernelm_sdk.plugin import Context, Job, JobCancelled
from kernelm_sdk.system import CancelJob, Dispatch, Empty, Report, Work

log = logging.getLogger("kernelm.runner")
REPORT_EVERY_S = 0.5
REMEMBERED = 1000  # jobs that are over, with their epochs


class JobsInHand:
    """At most `most` jobs at a time, in the hands of the instance `name`."""

    def __init__(self, bus: Bus, name: str, most: int) -> None:
        self.bus, self.name, self.most = bus, name, most
        self.working: dict[str, tuple[Job, asyncio.Task[None]]] = {}
        self.over: dict[str, int] = {}  # job -> last epoch of it that ended here
        self.granted: Callable[[float], None] = lambda cores: None  # called with the cores of all of them when these change

    def accepting(self, context: Context, method: Method, handler: Callable[..., Any]) -> Callable[..., Any]:
        async def accept(dispatch: Dispatch, call: Any) -> Empty:
            if call.caller != "jobs":
                raise ClientFault("permission_denied", f"{method.name} is a job: submit it with jobs/1.submit")
            old = self.working.get(dispatch.job)
            if (old and old[0].epoch >= dispatch.epoch) or self.over.get(dispatch.job, 0) >= dispatch.epoch:
                return Empty()  # handed over twice
            if old:
                await self._cancel(old[0], old[1], f"epoch {dispatch.epoch} has it now")
            if len(self.working) >= self.most:
                raise ClientFault("busy", f"{self.name} has {len(self.working)} of {self.most} jobs", retriable=True)
            try:
                request = msgspec.json.decode(dispatch.request, type=method.request)
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
                what = f"{method.contract.id()}.{method.name}"
                raise ClientFault("invalid", f"{what}: {error}", "correct the stage's `with`") from None
            job = Job(context, call.caller, dispatch.job, dispatch.epoch, dispatch.attempt,
                      dispatch.checkpoint, dispatch.run, dispatch.name)  # fmt: skip
            job.resources, job.rank, job.peers, job.address = dispatch.resources, dispatch.rank, dispatch.peers, dispatch.address
            self.working[job.id] = (job, asyncio.create_task(self._work(job, handler, request)))
            self.share()
            return Empty()

        return accept

    async def _work(self, job: Job, handler: Callable[..., Any], request: Any) -> None:
        async def report(checkpoint: str, address: str = "", note: str = "", left: str = "") -> None:
            await self._report(job, Report(job.id, job.epoch, job.latest, checkpoint, address=address, note=note, left=left))

        job.report = report
        reporter = asyncio.create_task(self._report_progress(job))
        result: dict[str, Any] | None = None
        fault: FaultBody | None = None
        try:
            result = msgspec.to_builtins(await handler(request, job))
        except (JobCancelled, asyncio.CancelledError) as error:
            log.info("job %s/%d was taken away: %s", job.id, job.epoch, job.cancelled or error)
        except Fault as error:
            fault = error.body()
        except MemoryError:
            fault = PluginFault("out_of_memory", f"{job.name or job.id} ran out of memory", "give the stage more memory_mb").body()
        except Exception as error:  # a bug of the plugin: the log has the trace, the record a line
            log.exception("job %s failed", job.id)
            fault = _unexpected(error, self.name).body()
        finally:
            reporter.cancel()
        if job.cancelled == "" and (result is not None or fault is not None):
            with contextlib.suppress(Fault):  # stale: somebody else has it; nothing else can be done about it here
                await self._report(job, Report(job.id, job.epoch, None, "", result, fault))
        if self.working.get(job.id, (None,))[0] is job:
            del self.working[job.id]
            self.share()
            self.over[job.id] = job.epoch  # its dispatch may come once more, late: that must not begin it again
            if len(self.over) > REMEMBERED:
                del self.over[next(iter(self.over))]

    def share(self) -> None:
        """Have the share of the processor that it and its jobs were granted."""
        self.granted(sum(job.resources.cpu for job, _ in self.working.values() if job.resources))

    async def _report_progress(self, job: Job) -> None:
        while True:
            await job.changed.wait()
            job.changed.clear()
            with contextlib.suppress(KernelFault):  # the next one will tell
                await self._report(job, Report(job.id, job.epoch, job.latest), patience_s=0.0)
            await asyncio.sleep(REPORT_EVERY_S)

    async def _report(self, job: Job, report: Report, patience_s: float = 600.0) -> None:
        try:
            await self.bus.call(Work.report, report, timeout_s=10.0, patience_s=patience_s)
        except ClientFault as fault:
            if fault.code in ("stale_epoch", "not_found"):
                job.cancelled = job.cancelled or fault.message
            raise

    async def _cancel(self, job: Job, task: asyncio.Task[None], reason: str) -> None:
        job.cancelled = reason
        done, _ = await asyncio.wait([task], timeout=5.0)  # from a thread it leaves at its next `progress`
        if not done:
            task.cancel()

    async def cancel(self, request: CancelJob) -> None:
        """The job, unless a later epoch of it is here."""
        job, task = self.working.get(request.job, (None, None))
        if job is not None and task is not None and job.epoch <= request.epoch:
            await self._cancel(job, task, request.reason or "cancelled")

    def leave(self) -> None:
        """All of them, as the instance stops."""
        for job, task in list(self.working.values()):
            job.cancelled = "the instance stops"
            task.cancel()


def _unexpected(error: Exception, instance: str) -> PluginFault:
    """What is told of what a job raised that is no fault: a full disk is the node's matter, all else a bug."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return PluginFault("disk_full", f"there was no room for its files: {error}", "free some room on the disk of that node")
    return PluginFault("internal", f"{type(error).__name__}: {error}", f"see logs/{instance}.log in its node's home")


__all__ = ["JobsInHand"]
