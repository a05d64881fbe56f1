"""The launcher of one machine: parent of broker, kernel and services. It knows nothing about what they do.

The broker first; then kernel and services at once, since whoever joins waits for the kernel, and importing is most of a
start. Each is awaited by its condition, kept running, and stopped in the reverse order. Killed itself, the launcher takes
its children with it (PR_SET_PDEATHSIG), and the next launcher on the home ends what may be left.
"""

import asyncio
import logging
import os
import sys
import time
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import psutil

from kernelm_authority.broker import Broker, find_server
from kernelm_authority.files import write_secret
from kernelm_authority.identity import Authority, admin, init_home
from kernelm_cli.child import Child
from kernelm_cli.home import HomeLock, UpFile, check_port, end, last_lines, leftovers, read_up, write_up
from kernelm_cli.storage import watch
from kernelm_sdk.bus import Bus
from kernelm_sdk.errors import ClientFault, Fault, KernelFault
from kernelm_sdk.plugin import find_manifests
from kernelm_sdk.system import Empty, Instance, Kernel, SystemState

SERVICES = {"artifacts": "artifacts", "node": "node-local", "jobs": "jobs", "gateway": "gateway"}  # name -> instance
LONG_IMPORTS = ("gateway",)  # started first: the others are done before it anyway
HOST = "127.0.0.1"
BROKER_S, KERNEL_S, SERVICE_S, PLUGIN_S = 20.0, 60.0, 120.0, 180.0  # patience with each, on a loaded machine of 2 cores
STRANGER_S = 20.0  # more, for a stranger's plugin that is neither ready nor given up when all else is ready
GRACE_S = 10.0
LOOK_S = 0.02  # between two looks at a condition
PRIVATE = frozenset(f"KERNELM_{n}" for n in ("KEY", "INSTANCE", "PLUGIN", "POOL", "SCRATCH", "TOKEN_FILE", "SAFE"))
log = logging.getLogger("kernelm.launcher")

Tell = Callable[[str, str, str], None]  # name, "starting", "ready", "broken", "left out" or "stopping", detail


class Options(NamedTuple):
    """What `kernelm up` was asked for. Port 0: a free one."""

    http_port: int = 0
    grpc_port: int = 0
    broker_port: int = 0
    safe: bool = False  # without the plugins of third parties


class Launcher:
    """`await up()`, then `await serve()` until it is cancelled; `await down()` in any case."""

    def __init__(self, home: Path, options: Options, tell: Tell) -> None:
        self.home, self.options, self.tell = home, options, tell
        self.lock = HomeLock(home)
        self.children: dict[str, Child] = {}
        self.up_file: UpFile | None = None
        self.is_ready = False
        self._bus: Bus | None = None

    async def up(self) -> UpFile:
        """Start everything and wait until it is ready. The first fault ends it; `down` then cleans up."""
        self.lock.take()
        if (earlier := read_up(self.home)) and not earlier.pid:
            raise ClientFault("deployed", f"{self.home} is run by an engine, as containers", "docker compose up, or another --home")
        end(leftovers(self.home))
        find_server()
        http, grpc, port = self._ports()
        authority = init_home(self.home)
        broker = Broker(self.home, authority, port)
        broker.write_config()
        me = psutil.Process()
        self.up_file = UpFile(me.pid, me.create_time(), broker.url, f"http://{HOST}:{http}", f"{HOST}:{grpc}", time.time())
        await self._start_broker(broker)
        self._add("kernel", [sys.executable, "-m", "kernelm"], self._environment)
        for name, instance in SERVICES.items():
            ports = {"KERNELM_HTTP_PORT": str(http), "KERNELM_GRPC_PORT": str(grpc)} if name == "gateway" else {}
            self._add(name, [sys.executable, "-m", f"kernelm_{name}"], partial(self._joining, authority, name, instance, ports))
        for name in ("kernel", *sorted(SERVICES, key=LONG_IMPORTS.__contains__, reverse=True)):
            await self._start(name)
        await self._await_kernel()
        await self._await_services()
        await self._await_plugins()
        for child in self.children.values():
            child.keep()
        self.is_ready = True
        return self.up_file

    async def serve(self) -> None:
        """Keep the children running; ends only by cancellation."""
        if self._bus is not None:
            await self._bus.close()
            self._bus = None
        await watch(self._url, self.home, self.children["broker"].restart)

    async def down(self) -> None:
        """Stop in reverse order of start, and give the home free."""
        if self._bus is not None:
            await self._bus.close()
        for name, child in reversed(self.children.items()):
            self.tell(name, "stopping", "")
            await child.stop(GRACE_S)
        if self.up_file is not None:
            end(leftovers(self.home))
            for token in (self.home / "run" / "tokens").glob("*"):  # not used: its service never came that far
                token.unlink(missing_ok=True)
            (self.home / "run" / "up.json").unlink(missing_ok=True)
        self.lock.drop()

    # ---- steps ----

    def _ports(self) -> tuple[int, int, int]:
        options = self.options
        wanted = {"--http-port": options.http_port, "--grpc-port": options.grpc_port, "--broker-port": options.broker_port}
        given = [port for port in wanted.values() if port]
        if len(set(given)) < len(given):
            raise ClientFault("port_taken", f"one port is given twice: {', '.join(f'{k} {v}' for k, v in wanted.items() if v)}",
                              "three different ones are needed; leave one out for a free one")  # fmt: skip
        http, grpc, broker = (check_port(port, option, HOST) for option, port in wanted.items())
        return http, grpc, broker

    def _add(self, name: str, command: list[str], environment: Callable[[], dict[str, str]]) -> None:
        self.children[name] = Child(self.home, name, command, environment, self._write_up)

    async def _start(self, name: str) -> None:
        self.tell(name, "starting", "")
        await self.children[name].start()

    async def _start_broker(self, broker: Broker) -> None:
        self._add("broker", broker.command(), self._environment)
        await self._start("broker")

        async def answering() -> str:
            try:
                _, writer = await asyncio.open_connection(broker.host, broker.port)
            except OSError as error:
                return str(error)
            writer.close()
            return ""

        await self._until("broker", answering, BROKER_S)
        self.tell("broker", "ready", broker.url)

    async def _await_kernel(self) -> None:
        async def answering() -> str:
            try:
                if self._bus is None:
                    self._bus = await Bus.connect(self._url, admin(self.home), timeout_s=1.0)
                await self._state()
            except Fault as fault:  # "unauthorized" too: until the kernel has pushed the account, the broker knows nobody
                if fault.code not in ("unauthorized", "permission_denied") and not fault.retriable:
                    raise
                return str(fault)
            return ""

        await self._until("kernel", answering, KERNEL_S)
        self.tell("kernel", "ready", "")

    async def _await_services(self) -> None:
        missing = dict(SERVICES)

        async def all_ready() -> str:
            for instance in self._of_this_life(await self._state()):
                for name in [n for n, i in missing.items() if i == instance.id and instance.state == "ready"]:
                    del missing[name]
                    self.tell(name, "ready", "")
            return f"not ready: {', '.join(missing)}" if missing else ""

        await self._until(lambda: next(iter(missing), ""), all_ready, SERVICE_S)

    async def _await_plugins(self) -> None:
        """Wait for every pool that serves contracts. A broken plugin of kernelm's own ends the start; a stranger's is
        reported and left to the supervisor, whose quarantine keeps it from harming anybody."""
        manifests, _ = find_manifests()
        told: set[str] = set()
        strangers_until = 0.0

        def tell_once(name: str, state: str, detail: str) -> None:
            if name not in told:
                told.add(name)
                self.tell(name, state, detail)

        async def all_ready() -> str:
            nonlocal strangers_until
            state = await self._state()
            ours, strangers = [], []
            ready = {i.pool for i in self._of_this_life(state) if i.state == "ready"}
            for pool in [p for p in state.pools if p.contracts and not p.parked]:
                why = state.health.get(f"pool {pool.pool}", "")
                own = not pool.source and pool.plugin in manifests and manifests[pool.plugin].entry.startswith("kernelm_")
                if self.options.safe and not own:
                    tell_once(pool.pool, "left out", "a plugin of a third party, by --safe")
                elif pool.pool in ready:
                    tell_once(pool.pool, "ready", "plugin")
                elif why and own:
                    raise self._plugin_fault(pool.plugin, why, state)
                elif why or pool.pool in told:
                    tell_once(pool.pool, "broken", why)
                else:
                    (ours if own else strangers).append(pool.pool)
            strangers_until = strangers_until or (0.0 if ours else time.monotonic() + STRANGER_S)
            if strangers and not ours and time.monotonic() > strangers_until:
                for name in strangers:
                    tell_once(name, "broken", f"not ready after {STRANGER_S:g} s, see its log; --safe leaves it out")
                return ""
            return f"not ready: {', '.join(ours + strangers)}" if ours + strangers else ""

        await self._until("node", all_ready, PLUGIN_S)

    # ---- parts ----

    @property
    def _url(self) -> str:
        assert self.up_file is not None
        return self.up_file.url

    async def _state(self) -> SystemState:
        assert self._bus is not None
        state: SystemState = await self._bus.call(Kernel.state, Empty(), timeout_s=5.0)
        return state

    def _of_this_life(self, state: SystemState) -> list[Instance]:
        """The kernel also remembers instances of an earlier life, until their leases run out."""
        assert self.up_file is not None
        return [i for i in state.instances if i.since >= self.up_file.started]

    async def _until(self, name: str | Callable[[], str], condition: Callable[[], Awaitable[str]], patience_s: float) -> None:
        """Wait until `condition` says "" (else what is missing) or a child ends. `name`: whose log tells why it does not."""
        until = time.monotonic() + patience_s
        missing = "it was not asked"
        while True:
            for child in self.children.values():
                child.check()
            try:
                if not (missing := await condition()):
                    return
            except KernelFault as fault:
                if not fault.retriable:
                    raise
                missing = str(fault)
            if time.monotonic() > until:
                who = self.children[name if isinstance(name, str) else name()]
                raise KernelFault("not_ready", f"{who.name} is not ready after {patience_s:g} s: {missing}",
                                  f"read {who.log_file}, and `kernelm doctor`", child=who.name, log=who.last_lines())  # fmt: skip
            await asyncio.sleep(LOOK_S)

    def _plugin_fault(self, plugin: str, why: str, state: SystemState) -> KernelFault:
        last = max((i for i in state.instances if i.plugin == plugin), key=lambda i: i.since, default=None)
        log_text = (last_lines(self.home, last.id) if last else "") or self.children["node"].last_lines()
        return KernelFault("plugin_failed", f"plugin {plugin} is {why}", f"read the logs in {self.home / 'logs'}",
                           plugin=plugin, log=log_text)  # fmt: skip

    def _environment(self) -> dict[str, str]:
        kept = {k: v for k, v in os.environ.items() if k not in PRIVATE}
        ours = {"KERNELM_URL": self._url, "KERNELM_HOME": str(self.home), "PYTHONUNBUFFERED": "1"}
        return kept | ours | ({"KERNELM_SAFE": "1"} if self.options.safe else {})

    def _joining(self, authority: Authority, name: str, instance: str, extra: dict[str, str]) -> dict[str, str]:
        """The environment of a service, with a fresh join token: one serves only once."""
        path = self.home / "run" / "tokens" / name
        write_secret(path, authority.token(instance))
        return self._environment() | {"KERNELM_TOKEN_FILE": str(path)} | extra

    def _write_up(self) -> None:
        assert self.up_file is not None
        processes = {n: c.identity for n, c in self.children.items() if c.identity.pid}
        up = self.up_file
        self.up_file = UpFile(up.pid, up.created, up.url, up.http, up.grpc, up.started,
                              {n: p.pid for n, p in processes.items()}, processes)  # fmt: skip
        write_up(self.home, self.up_file)
