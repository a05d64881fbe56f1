"""What the job table sees of the system: the kernel's state, the nodes' reports, the installed plugins."""

import asyncio
import logging

from kernelm_sdk.bus import Bus
from kernelm_sdk.errors import Fault
from kernelm_sdk.plugin import Manifest, find_manifests
from kernelm_sdk.system import Empty, Kernel, Node, NodeReport, SystemState

log = logging.getLogger("kernelm.jobs")


class Cluster:
    """Asks kernel and nodes; remembers nothing but the manifests."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._manifests: dict[str, Manifest] = {}
        self._looked_for: set[str] = set()

    async def system(self, patience_s: float = 0.0) -> SystemState:
        """The kernel's state; KernelFault if it does not answer within `patience_s` and a call's own time-out."""
        state: SystemState = await self._bus.call(Kernel.state, Empty(), timeout_s=5.0, patience_s=patience_s)
        return state

    async def reports(self, system: SystemState) -> list[NodeReport]:
        """The report of every ready node that answers; a silent one is logged, and gets no jobs in this round."""
        nodes = [i.id for i in system.instances if i.state == "ready" and "node/1" in i.contracts]
        answers = await asyncio.gather(*(self._report(node) for node in nodes))
        return [report for report in answers if report is not None]

    async def _report(self, instance: str) -> NodeReport | None:
        try:
            report: NodeReport = await self._bus.call(Node.report, Empty(), instance=instance, timeout_s=5.0)
            return report
        except Fault as fault:
            log.warning("%s does not report: %s", instance, fault.message)
            return None

    def manifests(self, system: SystemState) -> dict[str, Manifest]:
        """The installed plugins; read again when a plugin runs that was not installed before."""
        running = {i.plugin for i in system.instances}
        if not running <= self._looked_for:
            self._looked_for |= running
            self._manifests, broken = find_manifests()
            for name, why in broken.items():
                log.warning("plugin %s is left out: %s", name, why)
        return self._manifests
