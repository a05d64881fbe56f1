"""`scheduler/1` on the bus; every decision is made in `policy.py`."""

from typing import Any

from kernelm_contracts.scheduler import ClusterState, Decisions, Scheduler
from kernelm_scheduler import policy
from kernelm_scheduler.settings import Settings
from kernelm_sdk.plugin import Plugin


class SchedulerPlugin(Plugin, Scheduler):
    """Stateless: any number of instances may answer, and each gives the same decisions."""

    Settings = Settings

    async def decide(self, request: ClusterState, call: Any) -> Decisions:
        return policy.decide(request, self.settings)
