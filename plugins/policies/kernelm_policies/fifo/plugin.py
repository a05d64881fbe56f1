"""First in, first out: the oldest job goes first, on the fastest type that has room; while it waits, nobody passes it."""

from math import inf
from typing import Any

from kernelm_contracts.deployments import WAITS
from kernelm_contracts.scheduler import ClusterState, Decision, Decisions, Scheduler
from kernelm_policies.placing import Room
from kernelm_policies.serving import beside_models
from kernelm_sdk.plugin import Plugin


class Fifo(Plugin, Scheduler):
    """No preemption, no backfill: what every other policy is measured against."""

    resizes = False

    def steady(self, request: ClusterState) -> float:
        """Unix seconds until which it decides nothing, if no job comes, ends, or becomes movable: for good."""
        return inf

    async def decide(self, request: ClusterState, call: Any) -> Decisions:
        return beside_models(request, decide)


def decide(state: ClusterState) -> Decisions:
    """One decision for every pending job."""
    room, decisions, head, behind = Room(state), [], "", ""
    for job in sorted(state.pending, key=lambda j: (j.submitted, j.id)):
        if head:
            decisions.append(Decision(job.id, "wait", reason=behind))
            continue
        found = next((f for t in room.types(job) if (f := room.find(job, t, job.members))), ())
        if not found:
            head, behind = job.id, f"{WAITS}behind {job.id}"
            decisions.append(Decision(job.id, "wait", reason=f"{WAITS}no {job.members} members' room is free"))
            continue
        plugin = room.plugin(job, found)
        room.take(job, found, plugin)
        decisions.append(Decision(job.id, "place", found[0].node, plugin, "the oldest that waits", allocation=found))
    return Decisions(state.version, tuple(decisions))
