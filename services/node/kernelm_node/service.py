"""The service `node/1`: starts instances, watches them, tells the kernel how they ended."""

import asyncio
import contextlib
import logging
import math
import os
import shutil
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, Protocol

import msgspec
import psutil

from kernelm_node.diagnosis import diagnose, last_lines
from kernelm_node.handles import Handles
from kernelm_node.logs import Logs
from kernelm_node.resources import MB, Machine, read_settings
from kernelm_node.runtimes import Runtimes
from kernelm_node.runtimes.runtime import HANDLE_VERSION, UNKNOWN_CODE, Exit, Handle, Launch, Runtime, Task
from kernelm_node.sources import Sources, stored
from kernelm_node.trust import Trust
from kernelm_sdk.contract import token
from kernelm_sdk.endings import heard
from kernelm_sdk.errors import ClientFault, Fault, KernelFault, invalid
from kernelm_sdk.plugin import Manifest, find_manifests
from kernelm_sdk.system import (
    AllowUnsigned,
    ArtifactName,
    Diagnosis,
    Empty,
    ExitReport,
    InstanceName,
    Kernel,
    NodeReport,
    Running,
    StartInstance,
    TrustVerdict,
)
from kernelm_trust.policy import read_policy

log = logging.getLogger("kernelm.node")
KILL_S = 10.0  # from SIGKILL to the end; longer means that it hangs in the kernel
FAREWELL_S = 2.0  # for the last reports to the kernel when the node itself stops


class Caller(Protocol):
    """What the service needs of the bus."""

    user: str

    async def call(self, declared: Any, request: msgspec.Struct, *, timeout_s: float = ..., patience_s: float = ...) -> Any: ...


class Entry:
    """One instance that this node answers for."""

    def __init__(self, handle: Handle, task: Task) -> None:
        self.handle, self.task = handle, task
        self.asked = False  # to stop: its end is no failure
        self.ended = asyncio.Event()

    def running(self) -> Running:
        h = self.handle
        return Running(h.instance, h.pool, h.plugin, h.runtime, self.task.pid)


class NodeService:
    """One machine. What it starts outlives it when it is killed, and is adopted by its successor."""

    def __init__(self, bus: Caller, home: Path) -> None:
        self._bus, self._home = bus, home
        self.name = bus.user.removeprefix("node-")
        settings = read_settings(os.environ)
        self._machine, self._logs = Machine(settings), Logs(home / "logs", settings.logs_mb)
        self._handles = Handles(home / "run" / "instances")
        self._entries: dict[str, Entry] = {}  # in the order of their start
        self._watchers: set[asyncio.Task[None]] = set()
        self._starting: dict[str, tuple[asyncio.Lock, int]] = {}  # by instance, with how many hold or want it
        self._runtimes = Runtimes(home)
        self._trust = Trust(home, read_policy(os.environ))
        self._sources = Sources(bus, self.name, self._trust, os.environ.get("KERNELM_MIRROR", ""))
        for folder in ("scratch", "run/tokens"):
            (home / folder).mkdir(parents=True, exist_ok=True)
        (home / "run" / "tokens").chmod(0o700)

    # ---- node/1 ----

    async def on_start(self) -> None:
        """Find out what the runtimes can do here, and adopt what an earlier node process started."""
        await self._runtimes.probe()
        await self._adopt()
        await self._prune()

    async def on_stop(self) -> None:
        """Stop all, the latest first."""
        await self._stop_all()
        await self._runtimes.close()

    async def start(self, request: StartInstance, call: Any) -> Running:
        """Start an instance. Repeating the request is harmless."""
        async with self._alone(request.instance):
            if entry := self._entries.get(request.instance):
                if (entry.handle.pool, entry.handle.plugin) != (request.pool, request.plugin):
                    raise ClientFault("already_exists", f"{request.instance} runs: {entry.running()}", "choose another name")
                return entry.running()
            for what in ("instance", "plugin", "pool"):
                _name(getattr(request, what), what)
            request = self._runtimes.ours(request)
            runtime = await self._runtimes.choose(request)
            return (await self._launch(request, runtime, await self._sources.of(request))).running()

    @contextlib.asynccontextmanager
    async def _alone(self, instance: str) -> AsyncIterator[None]:
        """One start of an instance at a time, so that a repeated request finds what the first one started."""
        lock, waiting = self._starting.get(instance, (asyncio.Lock(), 0))
        self._starting[instance] = lock, waiting + 1
        try:
            async with lock:
                yield
        finally:
            lock, waiting = self._starting.pop(instance)
            if waiting > 1:
                self._starting[instance] = lock, waiting - 1

    async def stop(self, request: InstanceName, call: Any) -> Empty:
        """Ask it to stop, kill it with all it started after `grace_s`; returns when it has ended. One that does not run
        is stopped already."""
        if entry := self._entries.get(request.instance):
            await self._end(entry, request.grace_s)
        return Empty()

    async def report(self, request: Empty, call: Any) -> NodeReport:
        """What this machine has, and what runs on it."""
        manifests, broken = await asyncio.to_thread(find_manifests)
        for name, reason in broken.items():
            log.warning("plugin %s is left out: %s", name, reason)
        running = tuple(e.running() for e in self._entries.values())
        free = self._machine.free(e.handle.needs for e in self._entries.values())
        artifacts = await asyncio.to_thread(stored, self._home)
        return NodeReport(self.name, self._machine.capacity(), free, running, {m.name: m.version for m in manifests.values()},
                          self._runtimes.usable(), artifacts)  # fmt: skip

    async def diagnose(self, request: InstanceName, call: Any) -> Diagnosis:
        """How an instance is, or how it ended, with the last lines of its log."""
        path = self._logs.path(_name(request.instance, "instance"))
        if entry := self._entries.get(request.instance):
            lines, _ = heard(await asyncio.to_thread(last_lines, path, entry.handle.log_offset))
            return Diagnosis(request.instance, _alive(entry), "\n".join(lines))
        if not path.exists():
            raise ClientFault("not_found", f"node {self.name} has no log of {request.instance}: it never ran there, or long ago",
                              "`kernelm ps` lists what runs")  # fmt: skip
        lines, _ = heard(await asyncio.to_thread(last_lines, path))
        advice = diagnose(Exit(UNKNOWN_CODE, "it is not running"), lines).partition("\n")[0]
        return Diagnosis(request.instance, advice, "\n".join(lines))

    async def trust(self, request: ArtifactName, call: Any) -> TrustVerdict:
        """Whether this node would run the plugin in an artifact."""
        return await self._trust.of_artifact(await self._sources.open(request.digest), request.digest)

    async def allow_unsigned(self, request: AllowUnsigned, call: Any) -> TrustVerdict:
        """Allow the plugin in an artifact, as its administrator; the verdict is how it stands from now on."""
        self._trust.allow(request, call.caller)
        return await self.trust(ArtifactName(request.digest), call)

    # ---- starting ----

    async def _launch(self, request: StartInstance, runtime: Runtime, plugin: tuple[Manifest, Path, Path | None]) -> Entry:
        """The handle is written before and after: a node that is killed in between leaves a trace to find it by."""
        name, path, (manifest, file, source) = request.instance, self._logs.path(request.instance), plugin
        scratch, secret = self._home / "scratch" / name, self._home / "run" / "tokens" / name
        handle = Handle(HANDLE_VERSION, request.runtime, name, request.plugin, request.pool, request.needs, time.time(),
                        str(path), self._logs.rotate(name))  # fmt: skip
        task: Task | None = None
        try:
            self._handles.write(handle)
            scratch.mkdir(mode=0o700, exist_ok=True)
            _write_secret(secret, request.token)
            environment = self._environment(request, scratch, secret, file, source)
            artifacts = await self._sources.open_all(request.artifacts)
            launch = Launch(name, request.plugin, request.pool, environment, scratch, path, manifest, request.needs, source,
                            request.limits, request.isolated, request.network, request.image, artifacts)  # fmt: skip
            task = await runtime.start(launch)
            handle = msgspec.structs.replace(handle, state=task.state)
            self._handles.write(handle)
        except Exception as error:
            if task is not None:
                await task.kill()
                await task.wait()
            self._clean(name)
            await runtime.clear(handle)
            self._handles.remove(name)
            if not isinstance(error, OSError):
                raise
            raise KernelFault("can_not_start", f"{name}: {error}", "look at the path that the message names") from error
        log.info("started %s (%s) as %s, pid %d", name, request.pool, request.runtime, task.pid)
        return self._watch(handle, task)

    def _environment(self, request: StartInstance, scratch: Path, secret: Path, file: Path, source: Path | None) -> dict[str, str]:
        """The node's own environment without what is the node's alone, who the instance is, and where its code lies."""
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("KERNELM_NODE_", "KERNELM_TOKEN", "KERNELM_HEALTH"))}
        if source is not None:
            inherited["PYTHONPATH"] = os.pathsep.join([str(source), *filter(None, [inherited.get("PYTHONPATH")])])
            inherited["PYTHONPYCACHEPREFIX"] = str(self._home / "run" / "pycache")  # the artifact stays as it is
        return inherited | {
            "KERNELM_URL": os.environ["KERNELM_URL"], "KERNELM_HOME": str(self._home), "KERNELM_INSTANCE": request.instance,
            "KERNELM_PLUGIN": request.plugin, "KERNELM_POOL": request.pool, "KERNELM_SCRATCH": str(scratch),
            "KERNELM_MANIFEST": str(file), "KERNELM_TOKEN_FILE": str(secret), "PYTHONUNBUFFERED": "1",
            **({"KERNELM_CPU": f"{request.needs.cpu:g}"} if request.needs.cpu > 0 else {}),
            **({"KERNELM_MEMORY_MB": str(request.needs.memory_mb)} if request.needs.memory_mb > 0 else {}),
        }  # fmt: skip

    async def _adopt(self) -> None:
        """Go on with what an earlier node process left: running instances, and ends that the kernel was not told."""
        for handle in await asyncio.to_thread(self._handles.all):
            task = None
            if handle.exit is None and self._runtimes.has(handle.runtime):
                task = await self._runtimes.find(handle.runtime).adopt(handle)
            if task is None:
                lost = handle.exit or Exit(UNKNOWN_CODE, "it ended while no node was watching")
                self._spawn(self._conclude(handle, lost, asked=False))
                continue
            if task.state != handle.state:
                handle = msgspec.structs.replace(handle, state=task.state)
                self._handles.write(handle)
            log.info("adopted %s (%s), pid %d", handle.instance, handle.pool, task.pid)
            self._watch(handle, task)

    # ---- watching and ending ----

    def _watch(self, handle: Handle, task: Task) -> Entry:
        entry = self._entries[handle.instance] = Entry(handle, task)

        def changed() -> None:
            entry.handle = msgspec.structs.replace(entry.handle, state=task.state)
            self._handles.write(entry.handle)

        task.changed = changed
        self._spawn(self._follow(entry))
        return entry

    def _spawn(self, work: Any) -> None:
        watcher = asyncio.create_task(work)
        self._watchers.add(watcher)
        watcher.add_done_callback(self._watchers.discard)
        watcher.add_done_callback(_log_crash)

    async def _follow(self, entry: Entry) -> None:
        exit = await entry.task.wait()
        handle = msgspec.structs.replace(entry.handle, exit=exit)
        del self._entries[handle.instance]
        entry.ended.set()
        try:
            self._handles.write(handle)
        except OSError as error:  # a full disk must not keep the kernel from hearing of it
            log.error("%s: %s", handle.instance, error)
        await self._conclude(handle, exit, entry.asked)

    async def _conclude(self, handle: Handle, exit: Exit, asked: bool) -> None:
        """Clean up and tell the kernel, which may be starting again itself; the handle stays until it knows."""
        self._clean(handle.instance)
        if self._runtimes.has(handle.runtime):
            await self._runtimes.find(handle.runtime).clear(handle)
        lines, fault = heard(await asyncio.to_thread(last_lines, Path(handle.log), handle.log_offset))
        diagnosis = "stopped as requested" if asked else diagnose(exit, lines)
        log.log(logging.INFO if asked or exit.code == 0 else logging.WARNING, "%s: %s", handle.instance, diagnosis)
        report = ExitReport(handle.instance, exit.code, diagnosis, fault if exit.code > 0 and not asked else None)
        try:
            await self._bus.call(Kernel.exited, report, timeout_s=5.0, patience_s=math.inf)
        except Fault as fault:  # not a matter of time: the same report would be refused again
            log.error("the kernel did not take the exit report of %s: %s", handle.instance, fault)
        self._handles.remove(handle.instance)
        await self._prune()

    async def _end(self, entry: Entry, grace_s: float) -> None:
        entry.asked = True
        entry.task.ask()
        if await _within(entry.ended, grace_s):
            return
        log.warning("%s did not stop within %g s: killing it", entry.handle.instance, grace_s)
        await entry.task.kill()
        if not await _within(entry.ended, KILL_S):
            raise KernelFault("can_not_stop", f"{entry.handle.instance} (pid {entry.task.pid}) does not end, even when killed",
                              "a process that hangs in the kernel (state D) waits for a disk or a device")  # fmt: skip

    async def _stop_all(self) -> None:
        for entry in sorted(self._entries.values(), key=lambda e: e.handle.started, reverse=True):
            try:
                await self._end(entry, InstanceName("").grace_s)
            except KernelFault as fault:
                log.error("%s", fault)
        if self._watchers:
            _, late = await asyncio.wait(self._watchers, timeout=FAREWELL_S)
            for watcher in late:  # the kernel is away: its handle stays, and the next node reports it
                watcher.cancel()

    def _clean(self, instance: str) -> None:
        (self._home / "run" / "tokens" / instance).unlink(missing_ok=True)
        shutil.rmtree(self._home / "scratch" / instance, onerror=_log_left)

    async def _prune(self) -> None:
        living = {*self._entries, *self._starting, *self._handles.names()}
        if removed := await asyncio.to_thread(self._logs.prune, living):
            log.info("logs of %d instances that ended long ago are removed", len(removed))


def _name(text: str, what: str) -> str:
    try:
        return token(text, what)
    except ValueError as error:
        raise invalid("the request", error) from None


def _write_secret(path: Path, text: str) -> None:
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)


def _alive(entry: Entry) -> str:
    since = time.time() - entry.handle.started
    if not entry.task.pid:
        return f"runs for {since:.0f} s in the node's process"
    try:
        process = psutil.Process(entry.task.pid)
        return f"runs for {since:.0f} s as pid {process.pid}, {process.memory_info().rss // MB} MB, {process.status()}"
    except psutil.NoSuchProcess:
        return "is just ending"


async def _within(event: asyncio.Event, timeout_s: float) -> bool:
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(event.wait(), timeout_s)
    return event.is_set()


def _log_crash(watcher: "asyncio.Task[None]") -> None:
    if not watcher.cancelled() and (error := watcher.exception()):
        log.error("watching an instance failed", exc_info=error)


def _log_left(function: Callable[..., Any], path: str, information: Any) -> None:
    if not isinstance(information[1], FileNotFoundError):
        log.warning("could not clean up %s: %s", path, information[1])
