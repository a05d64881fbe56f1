"""Scheduling rounds and what follows from them: placing, handing over, cancelling.

A round is coalesced: however much has changed, the next one sees it all. A placement is on record, with a new epoch,
before the instance hears of it; whoever held the job before can't write to its record any more.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import msgspec
from msgspec import structs

from kernelm_contracts.deployments import WAITS
from kernelm_contracts.jobs import JobRecord
from kernelm_contracts.scheduler import ClusterState, Decision, Decisions, PendingJob, Share
from kernelm_jobs.asking import Asking
from kernelm_jobs.checks import check
from kernelm_jobs.cluster import Cluster
from kernelm_jobs.deploy import Deployer
from kernelm_jobs.deployment import is_replica
from kernelm_jobs.holdings import avoided, holdings, instances_of, shares_of, size, times
from kernelm_jobs.moving import called_off, growth, moved, retargeted
from kernelm_jobs.rounds import (
    Crews,
    Free,
    Shown,
    Worker,
    choose_all,
    cluster_state,
    deadlock,
    loaded_models,
    pending_jobs,
    workers,
)
from kernelm_jobs.runs import content_key, method_named
from kernelm_jobs.scaling import Scaling
from kernelm_jobs.settings import Settings
from kernelm_jobs.states import FINAL, HOLDING, advance, failed, latest_checkpoint
from kernelm_jobs.table import Table
from kernelm_sdk.bus import Bus
from kernelm_sdk.errors import ClientFault, Fault, FaultBody, KernelFault
from kernelm_sdk.system import CancelJob, Dispatch, Lifecycle

log = logging.getLogger("kernelm.jobs")
AGAIN_S = 1.0  # until the next round after one that failed
HOLD_S, HOLD_MAX_S = 0.25, 10.0  # a job that came back waits so long before it is placed again, doubled every time


Change = Callable[[JobRecord], JobRecord]


class Dispatcher:
    """Turns queued jobs into running ones."""

    def __init__(self, bus: Bus, table: Table, cluster: Cluster, deployer: Deployer, scaling: Scaling, settings: Settings) -> None:
        self._bus, self._table, self._cluster, self._deployer, self._settings = bus, table, cluster, deployer, settings
        self.scaling = scaling
        scaling.wake = self.wake
        self.condemned: set[str] = set()  # instances that hang and are being stopped: no more jobs for them
        self._wake = asyncio.Event()
        self._asking = Asking(bus, f"{bus.user}-{bus.boot}")
        self._shown = Shown()
        self._held: dict[str, tuple[float, int]] = {}  # job -> not before (monotonic), how often it came back
        self._tasks: set[asyncio.Task[None]] = set()
        table.listeners.append(self._changed)

    def recover(self) -> None:
        """After a restart: what was placed may not have been handed over; instances take the same epoch twice in peace."""
        for job in self._table.jobs.values():
            if job.state == "placed" and not is_replica(job):
                self.spawn(self._hand_over(job))
            if job.stopping:
                self.spawn(self._patience(job))

    def wake(self) -> None:
        """Have another round."""
        self._wake.set()

    async def stop(self) -> None:
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _changed(self, job: JobRecord) -> None:
        if job.state in FINAL:
            self._held.pop(job.id, None)
        if job.state in FINAL or job.state == "queued":
            self._wake.set()

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Do `work` in the background, until this service stops; what it raises is logged."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()):
            log.error("a task of the dispatcher failed", exc_info=error)

    # ---- rounds ----

    async def run(self) -> None:
        """Rounds for ever: on every change, and when a job may be tried again."""
        while True:
            self._wake.clear()
            pause = await self._round()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause):  # not wait_for, which may lose a cancellation (CPython gh-86296)
                    await self._wake.wait()

    def hold(self, id: str) -> None:
        """Keep a job that came back from being placed again at once."""
        _, times = self._held.get(id, (0.0, 0))
        self._held[id] = time.monotonic() + min(HOLD_S * 2**times, HOLD_MAX_S), times + 1

    async def _round(self) -> float | None:
        """One round; seconds until the next even if nothing changes, None for no need."""
        now = time.monotonic()
        queued = self._table.jobs.in_states("queued")
        until = {job.id: self._held.get(job.id, (0.0, 0))[0] - now for job in queued}
        due = [job for job in queued if until[job.id] <= 0]
        pause = min((s for s in until.values() if s > 0), default=None)
        if due or self.scaling.scaled or self._table.jobs.in_states("running"):
            try:
                pause = min(await self._schedule(due), pause or HOLD_MAX_S)
            except Fault as fault:
                log.warning("a round failed: %s", fault)
                pause = AGAIN_S
        return pause

    async def _schedule(self, queued: list[JobRecord]) -> float:
        try:
            state, ready = await self.state(queued)
        except KernelFault as fault:
            return await self._nobody(queued, f"{WAITS}the kernel does not answer: {fault.message}")
        try:
            answer = await self._asking.decide(state)
        except Fault as fault:
            return await self._nobody(queued, f"{WAITS}no scheduler decides: {fault.message}")
        return await self._carry_out(structs.replace(state, version=self._asking.version), answer, ready)

    async def state(self, queued: Sequence[JobRecord], planned: Sequence[PendingJob] = ()) -> tuple[ClusterState, list[Worker]]:
        """What the scheduler decides on now, with `planned` jobs that are no records, and the instances that take jobs."""
        system = await self._cluster.system()
        reports, manifests = await self._cluster.reports(system), self._cluster.manifests(system)
        jobs = self._table.jobs.in_states(*HOLDING)
        ready = workers(system, jobs, {name: m.max_jobs for name, m in manifests.items()}, self.condemned)
        installed = {name: m.contracts for name, m in manifests.items()}
        deployments = {d.name: d for d in self._table.deployments.values()}
        self._shown.again()
        pending = [*pending_jobs(queued, system, installed, deployments, self._shown), *planned]
        held, models, settings = holdings(jobs, deployments, system), self.scaling.states(system), self._settings
        state = cluster_state(0, time.time(), held, pending, reports, ready, settings.quotas, settings.tenants, models=models,
                              loaded=loaded_models(system), shown=self._shown,
                              avoid=avoided(deployments.values(), time.time()))  # fmt: skip
        return state, ready

    async def _nobody(self, queued: list[JobRecord], why: str) -> float:
        await self._table.explain({job.id: why for job in queued})
        await self.scaling.explain({}, why)
        return AGAIN_S

    async def _carry_out(self, state: ClusterState, answer: Decisions, ready: Sequence[Worker]) -> float:
        """What was decided: everything that is written of it goes into one atomic batch, before any instance hears of it."""
        checked = check(state, answer)
        for id, complaint in checked.refused.items():
            log.error("a decision on %s is refused: %s", id, complaint)
        reasons = {id: f"{WAITS}{complaint}" for id, complaint in checked.refused.items()}
        room, crews = Free(state), Crews(ready)
        jobs = {job.id: job for job in self._table.jobs.in_states("queued", *HOLDING)}
        writes: dict[str, Change] = {}
        for decision in checked.accepted:
            if decision.action == "scale":
                now = room.scale(decision, state)
                if now.allocation or not decision.allocation:
                    await self.scaling.scale(now)
                else:
                    reasons[decision.job] = f"{WAITS}others make room for it"
                continue
            if (job := jobs.get(decision.job)) is None:  # cancelled meanwhile, or over; or a model that waits for a place
                reasons[decision.job] = decision.reason
                continue
            if decision.action == "place":
                if not room.take(shares_in(decision), job.spec.resources):
                    reasons[job.id] = f"{WAITS}others make room for it"
                    continue
                placement = self._placement(job, decision, crews)
                if isinstance(placement, str):
                    reasons[job.id] = placement
                else:
                    writes[job.id] = placement
            elif decision.action == "preempt":
                writes[job.id] = _told_to_stop(decision.reason)
            elif decision.action in ("migrate", "resize"):
                change, heir = retargeted(job, decision, crews)
                if isinstance(change, str):
                    log.error("a decision on %s is not carried out: %s", job.id, change)
                elif room.take(growth(job, decision), job.spec.resources):
                    writes[job.id] = change
                    if heir != job.instance:
                        crews.took(heir)
            elif decision.action == "reject":
                await self._reject(job, decision.reason)
            elif job.spec.parent and (never := deadlock(job, jobs, state.nodes)):
                await self._reject(job, never)
            elif decision.job in self._asking.fresh:
                reasons[job.id] = decision.reason
        await self._commit(jobs, writes)
        await self._table.explain(reasons)
        await self.scaling.explain(reasons)
        return AGAIN_S if checked.refused else self._settings.round_every_s  # nodes change without an event

    async def _commit(self, jobs: dict[str, JobRecord], writes: dict[str, Change]) -> None:
        for id, after in (await self._table.move_all(writes)).items():
            if after.state == "placed" and after.epoch == jobs[id].epoch + 1:
                if is_replica(after):
                    self._deployer.begin(after)
                else:
                    self.spawn(self._hand_over(after))
            elif after.stopping and not jobs[id].stopping:
                self.spawn(self._patience(after))

    async def _reject(self, job: JobRecord, why: str) -> None:
        fault = FaultBody("client", "unschedulable", f"{job.spec.name}: {why}", "ask for less, or add a node")
        await self._table.move(job.id, lambda now: advance(now, "reject", fault=fault, why=why) if now.state == "queued" else now)

    def _placement(self, job: JobRecord, decision: Decision, crews: Crews) -> Change | str:
        """The change that puts a placement on record, with instances taken from their crews; or why there is none."""
        gang, key = ("",), job.key
        if not is_replica(job):
            crew = choose_all(decision, job.spec, crews)
            if not crew:
                return f"{WAITS}{decision.plugin} on {decision.node} has fewer than {job.spec.gang} free instances that do " \
                       f"{job.spec.uses}"  # fmt: skip
            gang = tuple(worker.instance for worker in crew)
            key = content_key(job.spec.uses, crew[0].plugin, crew[0].version, job.spec.request)  # of what really does it
            for instance in gang:
                crews.took(instance)
        checkpoint = job.checkpoint or latest_checkpoint(key, self._table.jobs.with_key(key))

        def place(now: JobRecord) -> JobRecord:
            if now.state != "queued" or now.epoch != job.epoch:
                return now
            return advance(now, "place", node=decision.node, allocation=decision.allocation, instance=gang[0], key=key,
                           gang=gang if len(gang) > 1 else (), epoch=now.epoch + 1,
                           checkpoint=now.checkpoint or checkpoint, left=now.left if now.key == key else "",
                           why=decision.reason)  # fmt: skip

        return place

    # ---- making room ----

    async def make_room(self, job: JobRecord) -> None:
        """Stop a job that was told to make room, now that it has a checkpoint: it is queued again, or goes on as was decided."""

        def change(now: JobRecord) -> JobRecord:
            if not _same(now, job) or not now.stopping:
                return now
            if now.target:
                return moved(now)
            return advance(now, "preempt", node="", instance="", preemptions=now.preemptions + 1, why=f"{WAITS}{now.why}")

        if not job.target:
            self.hold(job.id)  # or it would be placed again, being older, before the one that it made room for
        after = await self._table.move(job.id, change)
        if after.state == "placed" and after.epoch == job.epoch + 1:
            if after.instance != job.instance:  # else it is told by the new epoch
                await self.tell(job, after.why)
            self.spawn(self._hand_over(after))
        elif after.state == "queued" and after.preemptions == job.preemptions + 1 and job.instance:
            await self.tell(job, after.why)

    async def _patience(self, job: JobRecord) -> None:
        """Stop the job without a checkpoint if it makes none in time; `Reports` does when it makes one."""
        await asyncio.sleep(max(job.stopping + self._settings.preempt_after_s - time.time(), 0.0))
        if job.target:
            await self._table.move(job.id, lambda now: called_off(now) if _same(now, job) else now)
        else:
            await self.make_room(job)

    # ---- handing over ----

    async def _hand_over(self, job: JobRecord) -> None:
        """Call the instance with the job. An answer that is lost is asked for again: the epoch makes it the same call."""
        spec, work = job.spec, _work(job)
        while _same(self._table.jobs.get(job.id), job):
            try:
                await self._bus.dispatch(method_named(spec.uses), work, job.instance)
            except Fault as fault:
                if fault.code in ("busy", "no_responders"):
                    await self._decline(job, fault)
                    return
                if isinstance(fault, KernelFault):
                    log.warning("hand-over of %s to %s: %s", job.id, job.instance, fault.message)
                    await asyncio.sleep(AGAIN_S)
                    continue
                await self.fail(job, fault.body())
                return
            await self._table.move(job.id, lambda now: advance(now, "accept") if _unanswered(now, job) else now)
            return

    async def muster(self, job: JobRecord) -> None:
        """Hand the job to the others of its gang, now that rank 0 can be met; who does not take it fails it for all."""
        for rank, instance in enumerate(job.gang[1:], 1):
            try:
                await self._bus.dispatch(method_named(job.spec.uses), _work(job, rank), instance)
            except Fault as fault:
                await self.fail(job, FaultBody("kernel", "lost", f"rank {rank} ({instance}) did not take it: {fault.message}",
                                               "it is tried again", retriable=True))  # fmt: skip
                return

    async def _decline(self, job: JobRecord, fault: Fault) -> None:
        self.hold(job.id)
        why = f"{WAITS}{job.instance} did not take it: {fault.message}"
        await self._table.move(job.id, lambda now: advance(now, "decline", node="", instance="", why=why)
                               if _unanswered(now, job) else now)  # fmt: skip

    async def fail(self, job: JobRecord, fault: FaultBody, why: str = "") -> None:
        """End this attempt of the job, if it is still under way: it is queued again, or dead."""
        self.hold(job.id)
        await self._table.move(job.id, lambda now: failed(now, fault, why) if _same(now, job) else now)
        self.dissolve(job, why or fault.message)

    def dissolve(self, job: JobRecord, why: str) -> None:
        """Tell the instances of a gang that it is over, in the background."""
        if job.gang:
            self.spawn(self.tell(job, why))

    # ---- cancelling ----

    async def cancel(self, id: str, why: str) -> JobRecord:
        """Cancel a job and its children; what is over already stays as it is. ClientFault "conflict" for a replica that serves."""
        job = self._table.jobs.need(id)
        if job.state in HOLDING and is_replica(job) and job.result:
            name = job.result["model"]
            raise ClientFault("conflict", f"{id} serves deployment {name!r}", f"`kernelm model undeploy {name}`, or deploy another")
        was = job

        def change(now: JobRecord) -> JobRecord:
            nonlocal was
            was = now
            return now if now.state in FINAL else advance(now, "cancel", why=why)

        job = await self._table.move(id, change)
        if was.state in HOLDING:
            self.spawn(self._deployer.abort(was) if is_replica(was) else self.tell(was, why))
        await self.cancel_children(id, f"{why} (its parent)")
        return job

    async def cancel_children(self, id: str, why: str) -> None:
        for child in self._table.jobs.children(id):
            if child.state not in FINAL:
                await self.cancel(child.id, why)

    async def tell(self, job: JobRecord, why: str) -> None:
        """Tell its instances that the job is not wanted any more; who does not hear has its next report refused."""
        for instance in instances_of(job):
            try:
                await self._bus.call(Lifecycle.cancel, CancelJob(job.id, job.epoch, why), instance=instance, timeout_s=10.0)
            except Fault as fault:
                log.warning("%s was not told that %s is cancelled: %s", instance, job.id, fault.message)


def _work(job: JobRecord, rank: int = 0) -> Dispatch:
    """What an instance is handed."""
    spec = job.spec
    mine = 1 if job.gang else size(shares_of(job))
    return Dispatch(job.id, job.epoch, job.attempt + 1, msgspec.Raw(msgspec.json.encode(spec.request)), job.checkpoint, spec.run,
                    spec.name, times(spec.resources, mine), rank, job.gang, job.meeting, job.trace)  # fmt: skip


def _same(now: JobRecord | None, job: JobRecord) -> bool:
    """Whether the job is still under way as this owner's."""
    return now is not None and now.epoch == job.epoch and now.state in HOLDING


def _unanswered(now: JobRecord, job: JobRecord) -> bool:
    """Whether the placement stands and the instance has neither accepted nor reported yet."""
    return _same(now, job) and now.state == "placed"


def _told_to_stop(why: str) -> Change:
    def change(now: JobRecord) -> JobRecord:
        return structs.replace(now, stopping=time.time(), why=why) if now.state in HOLDING and not now.stopping else now

    return change


def shares_in(decision: Decision) -> tuple[Share, ...]:
    """Where the decision puts the members of its job."""
    return decision.allocation or (Share(decision.node),)
