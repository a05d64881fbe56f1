"""Runtimes by name. A new one is a module here with a `Runtime`, and a line in RUNTIMES."""

from pathlib import Path

import msgspec

from kernelm_node.runtimes.container import ContainerRuntime
from kernelm_node.runtimes.containers import read_containers
from kernelm_node.runtimes.inproc import InprocRuntime
from kernelm_node.runtimes.process import ProcessRuntime
from kernelm_node.runtimes.runtime import Runtime
from kernelm_node.runtimes.venv import VenvRuntime
from kernelm_sdk.errors import ClientFault
from kernelm_sdk.system import StartInstance

RUNTIMES: tuple[type[Runtime], ...] = (ProcessRuntime, VenvRuntime, ContainerRuntime, InprocRuntime)


class Runtimes:
    """The runtimes of one node."""

    def __init__(self, home: Path) -> None:
        self._home, self._all = home, {r.name: r(home) for r in RUNTIMES}

    async def probe(self) -> None:
        for runtime in self._all.values():
            await runtime.probe()

    async def close(self) -> None:
        for runtime in self._all.values():
            await runtime.close()

    def usable(self) -> dict[str, tuple[str, ...]]:
        """Those that can be used here, and what they can do."""
        return {name: runtime.can for name, runtime in self._all.items() if not runtime.missing}

    def has(self, name: str) -> bool:
        return name in self._all

    def find(self, name: str) -> Runtime:
        """A runtime by its name; ClientFault "unsupported_runtime" that names what there is."""
        if name not in self._all:
            known = ", ".join(sorted(self._all))
            raise ClientFault("unsupported_runtime", f"this node has no runtime {name!r}", f"it has {known}")
        return self._all[name]

    def ours(self, request: StartInstance) -> StartInstance:
        """The request as the owner of this node has it: in a container, if all shall be."""
        only = read_containers(self._home).only
        return msgspec.structs.replace(request, runtime=ContainerRuntime.name) if only else request

    async def choose(self, request: StartInstance) -> Runtime:
        """The runtime that `request` names, if it can give what is asked for; else ClientFault "unsupported_runtime"."""
        runtime = self.find(request.runtime)
        if runtime.missing or lacking(runtime, request):
            await runtime.probe()
        if runtime.missing:
            raise ClientFault("unsupported_runtime", f"runtime {runtime.name!r} can't be used on this node: {runtime.missing}",
                              f"usable here: {', '.join(self.usable())}")  # fmt: skip
        if lacks := lacking(runtime, request):
            others = [name for name, other in self._all.items() if not other.missing and not lacking(other, request)]
            raise ClientFault("unsupported_runtime", f"runtime {runtime.name!r} on this node can't give {', '.join(lacks)}, "
                              f"which {request.plugin!r} asks for",
                              f"use the runtime {' or '.join(others)}" if others else
                              "ask for less (the manifest's limits, isolated, needs), or use a node that can")  # fmt: skip
        return runtime


def lacking(runtime: Runtime, request: StartInstance) -> list[str]:
    """What `request` asks for and `runtime` can't enforce here: "memory_limit (limits.memory_mb = 512)"."""
    limits = request.limits
    asked = {
        "cpu_limit": limits.cpu and f"limits.cpu = {limits.cpu:g}",
        "memory_limit": limits.memory_mb and f"limits.memory_mb = {limits.memory_mb}",
        "pids_limit": limits.pids and f"limits.pids = {limits.pids}",
        "gpu_limit": request.needs.gpus and f"needs.gpus = {request.needs.gpus}",
        "isolation": request.isolated and "isolated = true",
    }
    return [f"{ability} ({why})" for ability, why in asked.items() if why and ability not in runtime.can]
