"""A node whose instances are tasks of the test's own process: they join by the real protocol with their own identities, and
start in milliseconds. What a process or a container adds is tested with the real node service."""

import asyncio
import contextlib
from pathlib import Path
from typing import Any

from kernelm_sdk.bus import Bus, Credentials
from kernelm_sdk.enrollment import join
from kernelm_sdk.errors import ClientFault, Fault
from kernelm_sdk.plugin import Context, Plugin, load_plugin
from kernelm_sdk.runner import Member
from kernelm_sdk.system import (
    Diagnosis,
    Empty,
    ExitReport,
    InstanceName,
    Kernel,
    Manifest,
    NodeReport,
    Resources,
    Running,
    StartInstance,
)


class InlineNode:
    """Implements `node/1`. `plugins`: by the digest of its source, or by name, each plugin's manifest and class."""

    def __init__(self, bus: Bus, url: str, scratch: Path, plugins: dict[str, tuple[Manifest, type[Plugin]]]) -> None:
        self.bus, self.url, self.scratch, self.plugins = bus, url, scratch, plugins
        self.members: dict[str, Member] = {}
        self.started: list[str] = []
        self._tasks: dict[str, asyncio.Task[None]] = {}

    async def on_start(self) -> None:
        """Nothing to prepare."""

    async def on_stop(self) -> None:
        for task in list(self._tasks.values()):
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    async def start(self, request: StartInstance, call: Any) -> Running:
        key = request.source or request.plugin
        if key not in self.plugins:
            raise ClientFault("unknown_plugin", f"this node has no plugin {key!r}")
        if request.instance in self._tasks:  # asked twice
            return Running(request.instance, request.pool, request.plugin, request.runtime, 0)
        self.started.append(request.instance)
        self._tasks[request.instance] = asyncio.create_task(self._run(request, *self.plugins[key]))
        return Running(request.instance, request.pool, request.plugin, request.runtime, 0)

    async def _run(self, request: StartInstance, manifest: Manifest, factory: type[Plugin]) -> None:
        code, why = 0, ""
        bus: Bus | None = None
        try:
            credentials: Credentials = await join(self.url, request.token)
            bus = await Bus.connect(self.url, credentials)
            folder = self.scratch / request.instance
            folder.mkdir(parents=True, exist_ok=True)
            context = Context(bus, request.instance, request.pool, manifest, folder)
            member = Member(bus, request.instance, manifest.name, manifest.version, manifest.contracts, manifest.max_jobs)
            member.own_process = False
            self.members[request.instance] = member

            async def build(settings: dict[str, Any]) -> Plugin:
                return load_plugin(manifest, context, settings, factory)

            await member.run(build)
        except Exception as error:  # an exit like any other
            code, why = 1, f"{type(error).__name__}: {error}"
        finally:
            if bus is not None:
                await bus.close()
            self._tasks.pop(request.instance, None)
        with contextlib.suppress(Fault):  # a kernel that is gone learns it from the lease
            await self.bus.call(Kernel.exited, ExitReport(request.instance, code, why), timeout_s=5.0, patience_s=5.0)

    def crash(self, instance: str) -> None:
        """End an instance as a crash would: from one moment to the next, and its exit is reported as a failure."""
        self._tasks[instance].cancel()

    async def stop(self, request: InstanceName, call: Any) -> Empty:
        if member := self.members.get(request.instance):
            member.stopping.set()
        if task := self._tasks.get(request.instance):
            await asyncio.wait([task])
        return Empty()

    async def report(self, request: Empty, call: Any) -> NodeReport:
        running = tuple(Running(m.name, "", m.plugin, "inline", 0) for m in self.members.values())
        return NodeReport(self.bus.user.removeprefix("node-"), Resources(2.0, 4096), Resources(2.0, 4096), running)

    async def diagnose(self, request: InstanceName, call: Any) -> Diagnosis:
        return Diagnosis(request.instance, "", "")
