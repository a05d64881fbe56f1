"""Runs one member of the system, a plugin or a service, and speaks the plugin protocol for it (kernel/PROTOCOL.md).

enroll -> hello -> load and start -> serve -> ready -> renew ... -> drain -> stop. Jobs are accepted at once, worked on
in the background and reported on through `work/1`, every report with the job's epoch.
"""

import asyncio
import contextlib
import importlib
import logging
import math
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import uvloop

from kernelm_sdk import logs, tracing
from kernelm_sdk.bus import Bus, Credentials, Served, encode, handlers_of
from kernelm_sdk.contract import CONTRACTS, Method
from kernelm_sdk.discovery import Discovery
from kernelm_sdk.endings import last_words, loading
from kernelm_sdk.enrollment import join, new_seed, renew
from kernelm_sdk.errors import ClientFault, Fault, PluginFault
from kernelm_sdk.health import answer
from kernelm_sdk.jobs import JobsInHand
from kernelm_sdk.plugin import (
    Context,
    Manifest,
    Plugin,
    find_manifests,
    implemented,
    load_plugin,
    read_manifest,
)
from kernelm_sdk.relay import reachable
from kernelm_sdk.shares import Share
from kernelm_sdk.system import (
    CancelJob,
    ContractVersion,
    DrainRequest,
    Empty,
    Hello,
    Kernel,
    Probe,
    Ready,
)

log = logging.getLogger("kernelm.runner")
ORPHAN_S = 60.0  # without a broker for so long, an instance ends itself
TOKEN_S = 30.0  # a new token is laid down for each start, by somebody else (kernelm_authority.tokens)


class Member:
    """One member on the bus. `build(welcome)` makes what answers; the rest is the same for all."""

    def __init__(self, bus: Bus, name: str, plugin: str, version: str, contracts: tuple[str, ...], max_jobs: int = 1) -> None:
        self.bus, self.name, self.plugin, self.version, self.contracts = bus, name, plugin, version, contracts
        self.begun = time.time()
        self.own_process, self.orphaned = True, False
        self.state, self._lease_ttl_s = "starting", 0
        self.jobs = JobsInHand(bus, name, max_jobs)
        self.stopping = asyncio.Event()
        self.implementation: Any = None
        self.served: Served | None = None
        self.beside: list[asyncio.Task[None]] = []  # what goes on beside its work
        self._connected_at = time.monotonic()

    async def run(self, build: Callable[[dict[str, Any]], Awaitable[Any]]) -> None:
        """Live the whole life of the member; returns when it was asked to stop."""
        offered = tuple(ContractVersion(c, CONTRACTS[c].schema_hash()) for c in self.contracts if c in CONTRACTS)
        hello = Hello(self.name, self.plugin, self.version, offered)
        health = await answer(self.unready) if self.own_process else None
        welcome = await self.bus.call(Kernel.hello, hello, timeout_s=5.0, patience_s=60.0)
        self._lease_ttl_s = welcome.lease_ttl_s
        self.beside.append(asyncio.create_task(self._renew_lease(welcome.lease_ttl_s)))
        try:
            with loading():
                self.implementation = await build(welcome.settings)
                await self.implementation.on_start()
            models = tuple(self.implementation.models()) if hasattr(self.implementation, "models") else ()
            handlers = self._handlers(welcome.contracts) | handlers_of(self, "plugin/1")
            self.served = await self.bus.serve(handlers, pool=welcome.pool, instance=self.name, models=models)
            self.served.absent = getattr(self.implementation, "absent", self.served.absent)  # of a service that speaks for others
            methods = {key: method for key, (method, _) in handlers.items()}
            finding = Discovery(self.bus, self.plugin, self.name, self.version, welcome.pool, methods)
            await finding.answer(self.served, models)
            self.bus.reconnected.append(self._reconnected)
            await self._until_stopping(self.bus.call(Kernel.ready, Ready(self.name, models), timeout_s=5.0, patience_s=60.0))
            log.info("%s is ready in pool %s", self.name, welcome.pool)
            self.state = ""
            self.jobs.share()
            self.beside.append(telling := asyncio.create_task(self.bus.meter.run(self.bus)))
            await self.stopping.wait()
            self.state = "stopping"
            telling.cancel()
            await self.served.fence(30.0)
            with contextlib.suppress(Fault):  # the job table is away too: what was not yet told is not waited for
                await self.bus.meter.tell(self.bus)
            self.jobs.leave()
            await self.implementation.on_stop()
        finally:
            for task in self.beside:  # also where it is cancelled, as a task of another's process
                task.cancel()
            if health is not None:
                health.close()

    def unready(self) -> str:
        """Why it can't be relied upon at this moment, "" if it can: for who asks after its health."""
        silent = time.monotonic() - self._connected_at
        return self.state or ("" if silent <= self._lease_ttl_s else f"its lease was not renewed for {silent:.0f} s")

    async def _until_stopping(self, work: Awaitable[Any]) -> None:
        """Wait for `work`, and no longer than until the member is to stop: a kernel that is away must not keep it."""
        working, stopping = asyncio.ensure_future(work), asyncio.ensure_future(self.stopping.wait())
        try:
            await asyncio.wait([working, stopping], return_when=asyncio.FIRST_COMPLETED)
            if working.done():
                working.result()
        finally:
            working.cancel()
            stopping.cancel()

    def _handlers(self, contracts: tuple[str, ...]) -> dict[str, tuple[Method, Callable[..., Any]]]:
        if not isinstance(self.implementation, Plugin):
            beside = getattr(self.implementation, "addressed", {})  # what it answers when asked itself, and is no route for
            return handlers_of(self.implementation, *contracts) | beside
        handlers = implemented(self.implementation, contracts)
        take = partial(self.jobs.accepting, self.implementation.context)
        return {k: (m, take(m, tracing.job(m, h)) if m.kind == "job" else h) for k, (m, h) in handlers.items()}

    async def _reconnected(self) -> None:
        self._connected_at = time.monotonic()

    async def _renew_lease(self, ttl_s: int) -> None:
        """Renew the lease every third of it, and JWT and key at two thirds of their life; give up when orphaned. No answer is
        waited for longer than the lease can bear: two thirds of it, both together."""
        seed, due, pause = new_seed(), _renewal(self.bus.credentials), ttl_s / 3
        while True:
            begun = time.monotonic()
            try:
                body = encode({"instance": self.name, "renewed": time.time()})
                await self.bus.append(f"$KV.leases.{self.name}", body, {"Nats-TTL": str(ttl_s)}, timeout_s=pause)
                self._connected_at = time.monotonic()
                if time.time() > due:
                    await renew(self.bus, seed, timeout_s=pause)  # the same seed until it is done: an answer may be lost
                    seed, due = new_seed(), _renewal(self.bus.credentials)
            except Fault as fault:
                log.warning("lease: %s", fault.message)
            if self.bus.closed or time.monotonic() - self._connected_at > ORPHAN_S:
                log.error("%s is shut out or without a broker for %g s: it ends", self.name, ORPHAN_S)
                if not self.own_process:
                    self.orphaned = True
                    self.stopping.set()
                    return
                os._exit(3)  # a worker thread may be busy for long; nothing of it may count any more
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(max(min(begun + pause - time.monotonic(), max(due - time.time(), 0.2)), 0.0)):
                    await self.bus.ended.wait()

    # ---- plugin/1 ----

    async def probe(self, request: Empty, call: Any) -> Probe:
        served = self.served
        return Probe(self.name, time.time() - self.begun, tuple(f"{j.id}/{j.epoch}" for j, _ in self.jobs.working.values()),
                     served.in_flight if served else 0, served.answered if served else 0, served.failed if served else 0,
                     round(psutil.Process().memory_info().rss / 2**20, 1), tuple(served.latency) if served else (),
                     round(served.busy_s, 6) if served else 0.0)  # fmt: skip

    async def cancel(self, request: CancelJob, call: Any) -> Empty:
        await self.jobs.cancel(request)
        return Empty()

    async def drain(self, request: DrainRequest, call: Any) -> Probe:
        if self.served is not None:
            self.served.tasks.discard(asyncio.current_task())
            until = time.monotonic() + request.deadline_s
            await self.served.fence(request.deadline_s, keep_instance=True)
            if work := [task for _, task in self.jobs.working.values()]:  # those that don't end go on elsewhere, from a checkpoint
                await asyncio.wait(work, timeout=max(until - time.monotonic(), 0.0))
        return await self.probe(Empty(), call)

    async def stop(self, request: Empty, call: Any) -> Empty:
        asyncio.get_running_loop().call_later(0.05, self.stopping.set)  # after this call's answer is out
        return Empty()


def _renewal(credentials: Credentials) -> float:
    """When to renew: at two thirds of what is left of their life."""
    return time.time() + (credentials.expires - time.time()) * 2 / 3 if credentials.expires else math.inf


async def _connect(environment: Mapping[str, str]) -> Bus:
    token = Path(environment["KERNELM_TOKEN_FILE"])
    url, _ = await reachable(environment["KERNELM_URL"])  # in a container by a relay that lives as long as the event loop
    text = await _read(token)
    if os.access(token.parent, os.W_OK):  # a container's is mounted read-only, and the node deletes it
        token.unlink(missing_ok=True)
    credentials = await join(url, text)
    return await tracing.join_as_member(url, credentials)


async def _read(token: Path) -> str:
    """The join token, once it is there."""
    until = time.monotonic() + TOKEN_S
    while not token.exists():
        if time.monotonic() > until:
            raise ClientFault("no_token", f"no join token came to {token} within {TOKEN_S:g} s", "issue one, see deploy/README.md")
        await asyncio.sleep(0.05)
    return token.read_text()


def _manifest(plugin: str, path: str) -> Manifest:
    """The one in the file `path`, for a plugin that came as an artifact; else that of the installed plugin."""
    if path:
        return read_manifest(Path(path))
    manifests, broken = find_manifests()
    if plugin not in manifests:
        raise PluginFault("not_installed", f"plugin {plugin!r} is not installed: {broken.get(plugin, 'no such entry point')}")
    return manifests[plugin]


def _import(manifest: Manifest) -> None:
    """Import the entry's module; PluginFault "invalid_entry" when it is not there, unlike one that it needs itself."""
    module = manifest.entry.partition(":")[0]
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        if not error.name or not f"{module}.".startswith(f"{error.name}."):
            raise
        text = f"{manifest.name}: its entry is {manifest.entry!r}, and there is no module {error.name!r} among its files"
        raise PluginFault("invalid_entry", text, "correct `entry` in kernelm-plugin.toml, or add what is missing") from None


async def run_instance(environment: Mapping[str, str], stopping: asyncio.Event | None = None) -> int:
    """Run the plugin KERNELM_PLUGIN as the instance KERNELM_INSTANCE; its exit code. In a process of its own or as a
    task of the node's (`inproc`), where `stopping` takes the place of SIGTERM."""
    name, plugin = environment["KERNELM_INSTANCE"], environment["KERNELM_PLUGIN"]
    manifest = _manifest(plugin, environment.get("KERNELM_MANIFEST", ""))
    scratch = Path(environment["KERNELM_SCRATCH"])
    scratch.mkdir(parents=True, exist_ok=True)
    bus = await _connect(environment)
    try:
        cores = float(environment.get("KERNELM_CPU", 0))
        context = Context(bus, name, environment["KERNELM_POOL"], manifest, scratch, cores,
                          int(environment.get("KERNELM_MEMORY_MB", 0)), environment.get("KERNELM_MIRROR", ""))  # fmt: skip
        _import(manifest)  # declares its contracts
        member = Member(bus, name, plugin, manifest.version, manifest.contracts, manifest.max_jobs)
        if stopping is not None:
            member.stopping, member.own_process = stopping, False
        else:
            member.jobs.granted = Share(cores).grant

        async def build(settings: dict[str, Any]) -> Plugin:
            return load_plugin(manifest, context, settings)

        _stop_on_signals(member.stopping, stopping is None)
        await member.run(build)
    finally:
        await bus.close()
    return 3 if member.orphaned else 0


def run_service(name: str, contracts: tuple[str, ...], factory: Callable[[Bus, Path], Any]) -> None:
    """The whole main program of a service: `factory(bus, home)` makes what implements `contracts`, with `on_start`
    and `on_stop`. Exits 0 when asked to stop, 1 with the fault on stderr when it can't go on."""

    async def main() -> int:
        bus = await _connect(os.environ)
        member = Member(bus, bus.user, name, "", contracts)

        async def build(settings: dict[str, Any]) -> Any:
            return factory(bus, Path(os.environ["KERNELM_HOME"]))

        _stop_on_signals(member.stopping, True)
        await member.run(build)
        await bus.close()
        return 0

    sys.exit(_main(main, name))


def _stop_on_signals(stopping: asyncio.Event, wanted: bool) -> None:
    for number in (signal.SIGTERM, signal.SIGINT) if wanted else ():
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)


def _main(main: Callable[[], Any], name: str = "") -> int:  # "" for an instance, whose log its node reads
    logs.configure(name)
    try:
        return int(uvloop.run(main()))
    except Fault as fault:
        print(fault if name else last_words(fault), file=sys.stderr)
        return 1


def main() -> int:
    """The whole main program of an instance, in a process started for it or forked (forkserver.py); its exit code."""
    return _main(lambda: run_instance(os.environ))


__all__ = ["Member", "main", "run_instance", "run_service"]

if __name__ == "__main__":
    sys.exit(main())
