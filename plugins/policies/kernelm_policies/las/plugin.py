"""Least attained service in two queues: Tiresias-L (Gu et al., NSDI 2019, section 3.2). A job begins in the first queue and goes
to the second once it has had `threshold_s` device seconds; within a queue first in, first out; the first queue preempts."""

from math import inf
from typing import Any

from msgspec import Struct

from kernelm_contracts.scheduler import ClusterState, Decisions, Scheduler
from kernelm_policies import ranked
from kernelm_policies.placing import held
from kernelm_sdk.plugin import Plugin


class Settings(Struct, frozen=True, forbid_unknown_fields=True):
    threshold_s: float = 14400.0  # device seconds in the first queue: four devices for an hour


class Las(Plugin, Scheduler):
    """Needs no knowledge of what is left."""

    Settings = Settings
    resizes = False

    def steady(self, request: ClusterState) -> float:
        """Unix seconds until which it decides nothing, if no job comes, ends, or becomes movable: until the first that runs has had
        its time in the first queue. Not where speeds are known: they change with progress."""
        if ranked.any_speeds(request):
            return request.now
        threshold = self.settings.threshold_s
        return min((request.now + (threshold - job.served_s) / sum(share.members for share in held(job))
                    for job in request.placed if job.served_s < threshold), default=inf)  # fmt: skip

    async def decide(self, request: ClusterState, call: Any) -> Decisions:
        threshold = self.settings.threshold_s
        return ranked.decide(
            request, lambda job: (float(job.served_s >= threshold), job.submitted, job.id), "least attained service")
