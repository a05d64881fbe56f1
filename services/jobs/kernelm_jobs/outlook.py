"""Why a job waits, and when a run would start: asked of the scheduler now, and nothing is changed."""

import time

from msgspec import structs

from kernelm_contracts.jobs import JobRecord, Outlook, Plan, RunSpec
from kernelm_contracts.scheduler import Decision, PendingJob
from kernelm_jobs.asking import Asking
from kernelm_jobs.cluster import Cluster
from kernelm_jobs.dispatch import Dispatcher
from kernelm_jobs.pipeline import spec_of
from kernelm_jobs.rounds import Shown, pending_jobs
from kernelm_jobs.table import Table
from kernelm_sdk.bus import Bus


class Outlooks:
    """A second line of questions to the scheduler, beside that of the rounds."""

    def __init__(self, bus: Bus, table: Table, cluster: Cluster, dispatcher: Dispatcher) -> None:
        self._table, self._cluster, self._dispatcher = table, cluster, dispatcher
        self._asking = Asking(bus, f"{bus.user}-{bus.boot}-outlook")

    async def why(self, id: str) -> Outlook:
        """ClientFault "not_found" where there is no such job; faults of the scheduler where it does not answer."""
        job = self._table.jobs.need(id)
        if name := self._dispatcher.scaling.waiting(job):  # the deployment that it serves has lost its place
            outlook = _outlook(name, job.spec.name, job.state, await self._decided(()))
            return structs.replace(outlook, job=job.id, reason=job.why)
        if job.state != "queued":
            remedy = job.fault.remedy if job.fault and job.state == "dead" else ""
            return Outlook(job.id, job.spec.name, job.state, node=job.node, reason=job.why, remedy=remedy)
        decisions = await self._decided(())
        return _outlook(job.id, job.spec.name, "queued", decisions)

    async def plan(self, run: RunSpec) -> Plan:
        system = await self._cluster.system()
        installed = {name: m.contracts for name, m in self._cluster.manifests(system).items()}
        records = [JobRecord(f"planned {stage.name}", spec_of(run, stage), "", submitted=time.time()) for stage in run.stage]
        found = []
        for job in pending_jobs(records, system, installed, {}, Shown()):  # by itself each: they don't start at once
            found.append(_outlook(job.id, job.name, "planned", await self._decided((job,))))
        return Plan(tuple(structs.replace(outlook, job="") for outlook in found))

    async def _decided(self, planned: tuple[PendingJob, ...]) -> list[Decision]:
        queued = self._table.jobs.in_states("queued")
        state, _ = await self._dispatcher.state(queued, planned)
        self._asking.forget()  # an answer to the whole state has all who wait, in their order
        return list((await self._asking.decide(state)).decisions)


def _outlook(id: str, name: str, state: str, decisions: list[Decision]) -> Outlook:
    """The one outlook on a job among all decisions of a round."""
    ahead = 0
    for d in decisions:
        if d.job == id:
            starts = time.time() if d.action == "place" else d.starts
            return Outlook(id, name, state, d.action, d.node, d.reason, d.remedy, starts, ahead)
        ahead += d.action == "wait"
    return Outlook(id, name, state, reason="the scheduler gave no decision")
