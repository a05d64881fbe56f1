"""A whole system in one `async with`: a real nats-server, a real kernel, and whatever services and plugins a test needs.

    async with System() as system:
        bus = await system.connect("jobs")          # as the service of that name, enrolled with a token
        member = await system.plugin(MyScheduler, manifest)   # in this process, through the real protocol
        await system.service("jobs")                # `python -m kernelm_jobs`, a process of its own
"""

import asyncio
import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Literal

import msgspec

from kernelm.kernel import KernelService, open_kernel
from kernelm.testing.node import InlineNode
from kernelm_authority.broker import Broker
from kernelm_authority.files import write_secret
from kernelm_authority.identity import Grant, admin, init_home
from kernelm_sdk import tracing
from kernelm_sdk.bus import Bus
from kernelm_sdk.enrollment import join
from kernelm_sdk.errors import Fault
from kernelm_sdk.plugin import Context, Manifest, Plugin, load_plugin
from kernelm_sdk.runner import Member
from kernelm_sdk.system import Empty, Kernel, PoolSpec, SystemState

LEAST_S = 40.0


async def until(condition: Callable[[], Any], timeout_s: float = 10.0, what: str = "the condition") -> Any:
    """As `within`, with patience: not given up before LEAST_S, for how quick a machine is, is no test's subject."""
    return await within(condition, max(timeout_s, LEAST_S), what)


async def within(condition: Callable[[], Any], timeout_s: float, what: str = "the condition") -> Any:
    """Wait until `condition()` (a plain or coroutine function) is true; its value. AssertionError after `timeout_s`."""
    end = time.monotonic() + timeout_s
    while True:
        value = condition()
        if isinstance(value, Awaitable):
            value = await value
        if value:
            return value
        if time.monotonic() > end:
            raise AssertionError(f"{what} did not come true within {timeout_s:g} s")
        await asyncio.sleep(0.02)


class System:
    """One system in a temporary home. The kernel runs "inline" (in this process, with the test's manifests and no default
    pools) or as a "process" of its own, with what is installed."""

    def __init__(self, home: Path | None = None, *, kernel: Literal["inline", "process"] = "inline",
                 manifests: dict[str, Manifest] | None = None) -> None:  # fmt: skip
        self._temporary = home is None
        self.home = home or Path(tempfile.mkdtemp(prefix="kernelm-"))
        self.authority = init_home(self.home)
        self.broker = Broker(self.home, self.authority)
        self.kernel: KernelService | None = None
        self.admin: Bus
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self._how, self._manifests = kernel, manifests or {}
        self._buses: list[Bus] = []
        self._members: list[tuple[Member, asyncio.Task[None]]] = []
        self._nodes: list[InlineNode] = []
        self._memories: dict[str, str] = {}  # folder of plain artifacts, by further machine

    async def __aenter__(self) -> "System":
        self.broker.write_config()
        self.start_broker()
        await until(self._answers, 10, "the broker")
        if self._how == "inline":
            await self.start_kernel()
        else:
            self._spawn("kernelm", "kernelm")
        await until(self._admitted, 20, "the kernel")
        return self

    async def _admitted(self) -> bool:
        try:
            self.admin = await Bus.connect(self.broker.url, admin(self.home))
        except Fault:  # the account comes with the kernel's first push
            return False
        self._buses.append(self.admin)
        return bool(await self.state())

    def start_broker(self) -> None:
        self.processes["broker"] = subprocess.Popen(self.broker.command(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    async def _answers(self) -> bool:
        try:
            _, writer = await asyncio.open_connection(self.broker.host, self.broker.port)
        except OSError:
            return False
        writer.close()
        return True

    async def start_kernel(self, safe: bool = False) -> KernelService:
        """A kernel in this process, with the test's manifests and no default pools."""
        self.kernel = await open_kernel(self.home, self.broker.url)
        self.kernel.catalog.find = lambda: (self._manifests, {})
        self.kernel.catalog.refresh()
        await self.kernel.start(safe)
        self._buses.append(self.kernel.bus)
        return self.kernel

    async def track(self, connecting: Awaitable[Bus]) -> Bus:
        bus = await connecting
        self._buses.append(bus)
        return bus

    async def connect(self, name: str, grant: Grant | None = None) -> Bus:
        """A connection under `name`: a service's, or what `grant` says; enrolled with a one-time token."""
        credentials = await join(self.broker.url, self.authority.token(name, grant))
        return await self.track(tracing.join_as_member(self.broker.url, credentials))

    async def plugin(self, factory: type[Plugin], manifest: Manifest, *, pool: str = "", settings: dict[str, Any] | None = None,
                     instance: str = "") -> Member:  # fmt: skip
        """An instance of `factory` in this process, through the real protocol; returns when it is ready."""
        name, pool = instance or f"{manifest.name}-t{len(self._members)}", pool or manifest.name
        bus = await self.connect(name, Grant("plugin", name, pool, manifest.name, calls=manifest.calls, events=manifest.events))
        scratch = self.home / "scratch" / name
        scratch.mkdir(parents=True)
        context = Context(bus, name, pool, manifest, scratch)
        member = Member(bus, name, manifest.name, manifest.version, manifest.contracts, manifest.max_jobs)

        async def build(given: dict[str, Any]) -> Plugin:
            spec = msgspec.structs.replace(manifest, entry=f"{factory.__module__}:{factory.__qualname__}")
            return load_plugin(spec, context, given or settings or {}, factory)

        return await self.member(member, build)

    async def member(self, member: Member, build: Callable[[dict[str, Any]], Awaitable[Any]]) -> Member:
        task = asyncio.create_task(member.run(build))
        self._members.append((member, task))
        ready = asyncio.create_task(self.ready(member.name))
        await asyncio.wait([task, ready], return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            ready.cancel()
            task.result()
        await ready
        return member

    async def node(self, plugins: dict[str, tuple[Manifest, type[Plugin]]], name: str = "node-inline") -> InlineNode:
        """A node whose instances are tasks of this process: see `InlineNode`."""
        bus = await self.connect(name)
        node = InlineNode(bus, self.broker.url, self.home / "scratch", plugins)
        self._nodes.append(node)

        async def build(_: dict[str, Any]) -> InlineNode:
            return node

        await self.member(Member(bus, name, "node", "", ("node/1",)), build)
        return node

    async def service(self, name: str, **environment: str) -> subprocess.Popen[bytes]:
        """Start `python -m kernelm_<name>` with a token of its own; returns when it is ready."""
        identity = "node-local" if name == "node" else name
        await self._joining(identity, self.home / "run" / "tokens" / identity, name, f"kernelm_{name}", environment)
        return self.processes[name]

    async def machine(self, name: str, home: Path) -> tuple[str, ...]:
        """Start a further machine, which shares no folder with the first: the node `name` and, beside it, a mirror of the artifact
        store, with the folder `home`. Again, with the same, where its processes have ended. Their names in `processes`, when they
        are ready: node-<name> is the last."""
        if name not in self._memories:
            self._memories[name] = tempfile.mkdtemp(prefix=f"kernelm-{name}-", dir="/dev/shm")
        mirror = f"artifacts-{name}"
        environment = {"KERNELM_HOME": str(home), "KERNELM_ARTIFACTS_PLAIN": self._memories[name], "KERNELM_MIRROR": mirror}
        modules = {mirror: "kernelm_artifacts.mirror", f"node-{name}": "kernelm_node"}
        for member, module in modules.items():
            await self._joining(member, home / f"{member}.token", member, module, environment)
        return tuple(modules)

    async def _joining(self, identity: str, token: Path, name: str, module: str, environment: dict[str, str]) -> None:
        """Start the process `name`, with a token for `identity`, and wait until it is ready."""
        write_secret(token, self.authority.token(identity))
        since = time.time()
        self._spawn(name, module, **environment, KERNELM_TOKEN_FILE=str(token))
        await self.ready(identity, 60, since)

    def _spawn(self, name: str, module: str, **environment: str) -> None:
        env = {**os.environ, "KERNELM_URL": self.broker.url, "KERNELM_HOME": str(self.home), **environment}
        (self.home / "logs").mkdir(exist_ok=True)
        with (self.home / "logs" / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen([sys.executable, "-m", module], env=env, stdout=log, stderr=log)

    async def state(self) -> SystemState:
        state: SystemState = await self.admin.call(Kernel.state, Empty(), timeout_s=5.0, patience_s=10.0)
        return state

    async def ready(self, instance: str, timeout_s: float = 20.0, since: float = 0.0) -> None:
        async def there() -> bool:
            try:
                state = await self.state()
            except Fault:
                return False
            return any(i.id == instance and i.state == "ready" and i.since >= since for i in state.instances)

        await until(there, timeout_s, f"{instance} ready")

    async def pool(self, spec: PoolSpec, timeout_s: float = 60.0) -> None:
        """Start a pool and wait until it has a ready instance."""
        await self.admin.call(Kernel.start_pool, spec)

        async def there() -> bool:
            return any(i.pool == spec.pool and i.state == "ready" for i in (await self.state()).instances)

        await until(there, timeout_s, f"pool {spec.pool}")

    async def __aexit__(self, *_: object) -> None:
        for member, task in self._members:
            member.stopping.set()
            with contextlib.suppress(Exception):
                await asyncio.wait_for(task, 5)
        for node in self._nodes:  # what it has started, where it had no time left for that: without a broker, say
            with contextlib.suppress(Exception):
                await asyncio.wait_for(node.on_stop(), 5)
        for name in reversed(list(self.processes)):
            if name != "broker":
                self.processes[name].terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    await asyncio.to_thread(self.processes[name].wait, 10)
                self.processes[name].kill()
        if self.kernel is not None:
            await self.kernel.stop()
        for bus in self._buses:
            with contextlib.suppress(Exception):
                await bus.close()
        self.processes["broker"].kill()
        await asyncio.to_thread(self.processes["broker"].wait)
        for folder in (*self._memories.values(), *([str(self.home)] if self._temporary else [])):
            shutil.rmtree(folder, ignore_errors=True)
