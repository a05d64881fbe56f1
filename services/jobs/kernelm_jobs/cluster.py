"""What the job table sees of the system: the kernel's state and the nodes' reports."""

import asyncio
import logging

from msgspec import structs

from kernelm_sdk.bus import Bus
from kernelm_sdk.errors import Fault
from kernelm_sdk.system import Empty, Kernel, Manifest, Node, NodeReport, SystemState

log = logging.getLogger("kernelm.jobs")


class Cluster:
    """Asks kernel and nodes; remembers nothing."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus

    async def system(self, patience_s: float = 0.0) -> SystemState:
        """The kernel's state; KernelFault if it does not answer within `patience_s` and a call's own time-out."""
        state: SystemState = await self._bus.call(Kernel.state, Empty(), timeout_s=5.0, patience_s=patience_s)
        return state

    async def reports(self, system: SystemState) -> list[NodeReport]:
        """The report of every ready node that answers; a silent one is logged, and gets no jobs in this round. A plugin that came
        as an artifact and runs is to be had on every node."""
        nodes = [i.id for i in system.instances if i.state == "ready" and "node/1" in i.contracts]
        answers = await asyncio.gather(*(self._report(node) for node in nodes))
        versions = {p.source: p.manifest.version for p in system.plugins}
        carried = {p.plugin: versions.get(p.source, "") for p in system.pools if p.source and not p.parked}
        return [structs.replace(report, plugins={**report.plugins, **carried}) for report in answers if report is not None]

    async def _report(self, instance: str) -> NodeReport | None:
        try:
            report: NodeReport = await self._bus.call(Node.report, Empty(), instance=instance, timeout_s=5.0)
            return report
        except Fault as fault:
            log.warning("%s does not report: %s", instance, fault.message)
            return None

    @staticmethod
    def manifests(system: SystemState) -> dict[str, Manifest]:
        """The plugins that there are, by name; of several with one name the one that a pool runs."""
        sources = {pool.source for pool in system.pools if not pool.parked}
        known = sorted(system.plugins, key=lambda p: p.source in sources and p.source != "")
        return {p.manifest.name: p.manifest for p in known}
