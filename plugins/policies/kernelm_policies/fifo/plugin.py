"""First in, first out: the oldest job goes first, on the fastest type that has room; while it waits, nobody passes it."""

from typing import Any

from kernelm_contracts.scheduler import ClusterState, Decision, Decisions, Scheduler
from kernelm_policies.placing import Room
from kernelm_sdk.plugin import Plugin


class Fifo(Plugin, Scheduler):
    """No preemption, no backfill: what every other policy is measured against."""

    resizes = False

    async def decide(self, request: ClusterState, call: Any) -> Decisions:
        return decide(request)


def decide(state: ClusterState) -> Decisions:
    """One decision for every pending job."""
    room, decisions, head = Room(state), [], ""
    for job in sorted(state.pending, key=lambda j: (j.submitted, j.id)):
        found = () if head else next((f for t in room.types(job) if (f := room.find(job, t, job.members))), ())
        if not found:
            head = head or job.id
            reason = f"waits: behind {head}" if head != job.id else f"waits: no {job.members} members' room is free"
            decisions.append(Decision(job.id, "wait", reason=reason))
            continue
        plugin = room.plugin(job, found)
        room.take(job, found, plugin)
        decisions.append(Decision(job.id, "place", found[0].node, plugin, "the oldest that waits", allocation=found))
    return Decisions(state.version, tuple(decisions))
