"""Shortest remaining time first, preemptive: the least average completion time on one machine when run times are known
(Schrage, Operations Research 16, 1968). Needs jobs that tell how much is left; the others count as just begun."""

from math import inf
from typing import Any

from kernelm_contracts.scheduler import ClusterState, Decisions, Scheduler
from kernelm_policies import ranked
from kernelm_sdk.plugin import Plugin


class Srtf(Plugin, Scheduler):
    resizes = False

    def steady(self, request: ClusterState) -> float:
        """Unix seconds until which it decides nothing, if no job comes, ends, or becomes movable: for good, since who runs has less
        and less left. Not where speeds are known: they change with progress."""
        return request.now if ranked.any_speeds(request) else inf

    async def decide(self, request: ClusterState, call: Any) -> Decisions:
        return ranked.decide(request, lambda job: (ranked.seconds_left(job), job.submitted, job.id), "shortest remaining time")
