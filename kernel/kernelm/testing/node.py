"""A node whose instances are tasks of the test's own process: they join by the real protocol with their own identities, and
start in milliseconds. What a process or a container adds is tested with the real node service."""

import asyncio
from pathlib import Path
from typing import Any

from kernelm_sdk.bus import Bus
from kernelm_sdk.endings import heard, last_words
from kernelm_sdk.enrollment import join
from kernelm_sdk.errors import ClientFault, Fault, KernelFault
from kernelm_sdk.plugin import Context, Plugin, load_plugin
from kernelm_sdk.runner import Member
from kernelm_sdk.system import (
    AllowUnsigned,
    ArtifactName,
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
    TrustVerdict,
)

GRACE_S = 0.5  # at most between the polite request and the kill


class InlineNode:
    """Implements `node/1`. `plugins`: by the digest of its source, or by name, each plugin's manifest and class; a test may
    put other classes into `factories`."""

    def __init__(self, bus: Bus, url: str, scratch: Path, plugins: dict[str, tuple[Manifest, type[Plugin]]]) -> None:
        self.bus, self.url, self.scratch = bus, url, scratch
        self.manifests = {key: manifest for key, (manifest, _) in plugins.items()}
        self.factories = {key: factory for key, (_, factory) in plugins.items()}
        self.capacity = Resources(2.0, 8000)
        self.members: dict[str, tuple[Member, asyncio.Task[None]]] = {}  # those that run
        self.started: list[str] = []
        self.stopped: list[str] = []
        self._over = False

    async def on_start(self) -> None:
        """Nothing to prepare."""

    async def on_stop(self) -> None:
        self._over = True
        while self.members:  # one may end by itself while another is killed
            await self.kill(next(iter(self.members)))

    async def start(self, request: StartInstance, call: Any) -> Running:
        key = request.source or request.plugin
        if key not in self.manifests:
            raise ClientFault("unknown_plugin", f"this node has no plugin {key!r}")
        if request.instance not in self.started:  # else it was asked twice
            self.started.append(request.instance)
            await self._begin(request, key)
        return Running(request.instance, request.pool, request.plugin, request.runtime, 0)

    async def _begin(self, request: StartInstance, key: str) -> None:
        manifest, name = self.manifests[key], request.instance
        bus = await Bus.connect(self.url, await join(self.url, request.token))
        if self._over:  # meanwhile: nobody would end it any more
            await bus.close()
            raise KernelFault("stopping", f"the node stops: {name} was not started", "start it on another node", retriable=True)
        folder = self.scratch / name
        folder.mkdir(parents=True, exist_ok=True)
        context = Context(bus, name, request.pool, manifest, folder)
        member = Member(bus, name, manifest.name, manifest.version, manifest.contracts, manifest.max_jobs)
        member.own_process = False  # it lives in the test's: one that is shut out must not end it

        async def build(settings: dict[str, Any]) -> Plugin:
            return load_plugin(manifest, context, settings, self.factories[key])

        async def live() -> None:
            try:
                await member.run(build)
            finally:
                await bus.close()

        task = asyncio.create_task(live())
        self.members[name] = member, task
        task.add_done_callback(lambda done: self._ended(name, done))

    def _ended(self, instance: str, task: asyncio.Task[None]) -> None:
        del self.members[instance]
        code, why, fault = 0, "", None
        if task.cancelled():
            code, why = -9, "killed"
        elif error := task.exception():
            code, why = 1, f"{type(error).__name__}: {error}"
            _, fault = heard(last_words(error).splitlines()) if isinstance(error, Fault) else ([], None)
        report = ExitReport(instance, code, why, fault)
        told = asyncio.ensure_future(self.bus.call(Kernel.exited, report, timeout_s=5.0, patience_s=5.0))
        told.add_done_callback(lambda t: t.cancelled() or t.exception())  # a kernel that is gone learns it from the lease

    async def kill(self, instance: str) -> None:
        """End an instance as `kill -9` would: nothing is flushed, and its exit is reported as a failure."""
        member, task = self.members[instance]
        for each in (task, *member.beside):  # none may complain of the connection, which is closed for it to tell nobody
            each.cancel()
        await member.bus._link.close(0)
        await asyncio.wait([task])

    async def stop(self, request: InstanceName, call: Any) -> Empty:
        if entry := self.members.get(request.instance):
            self.stopped.append(request.instance)
            entry[0].stopping.set()
            await asyncio.wait([entry[1]], timeout=min(request.grace_s, GRACE_S))
            if not entry[1].done():
                await self.kill(request.instance)
        return Empty()

    async def report(self, request: Empty, call: Any) -> NodeReport:
        running = tuple(Running(m.name, "", m.plugin, "inline", 0) for m, _ in self.members.values())
        installed = {m.name: m.version for m in self.manifests.values()}
        return NodeReport(self.bus.user.removeprefix("node-"), self.capacity, self.capacity, running, installed)

    async def diagnose(self, request: InstanceName, call: Any) -> Diagnosis:
        return Diagnosis(request.instance, "", "")

    async def trust(self, request: ArtifactName, call: Any) -> TrustVerdict:
        return TrustVerdict(True, "nothing is demanded here", "none")

    async def allow_unsigned(self, request: AllowUnsigned, call: Any) -> TrustVerdict:
        return TrustVerdict(True, "nothing is demanded here", "none")
