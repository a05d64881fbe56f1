"""The gateway as a service: two listeners in one event loop, announced in `run/gateway.json`."""

import asyncio
import contextlib
import errno
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import msgspec
import uvicorn

from kernelm_gateway.connection import Connection
from kernelm_gateway.gate import Gate
from kernelm_gateway.grpc_api import start_grpc
from kernelm_gateway.http_api import make_app
from kernelm_gateway.policy import read_policy
from kernelm_gateway.settings import GatewaySettings
from kernelm_sdk import tls
from kernelm_sdk.errors import ClientFault

GRACE_S = 5  # for answers that are under way when the gateway stops
IDLE_S = 75  # a connection without a request is kept; longer than what stands in front usually keeps its own
BACKLOG = 2048
SEND_BUFFER = 256 * 1024  # bytes that wait in the system for a slow reader, who would be given 4 MB otherwise


class Announcement(msgspec.Struct, frozen=True):
    """`run/gateway.json`: where the gateway listens."""

    http: str  # URL
    grpc: str  # "host:port"


def bind(host: str, port: int, variable: str) -> socket.socket:
    """A socket on `host`:`port` (0: a free one). ClientFault that names the port and the `variable` to change."""
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)  # what it accepts inherits it
    try:
        listener.bind((host, port))
        listener.listen(BACKLOG)  # only now does a second listener on the port fail
    except OSError as error:
        listener.close()
        taken = error.errno == errno.EADDRINUSE
        what = f"port {port} on {host} is taken by another program" if taken else f"can't listen on {host}:{port}: {error.strerror}"
        remedy = f"end the program that listens there, or set {variable} to another port (0 for a free one)"
        raise ClientFault("port_taken" if taken else "port_refused", what, remedy) from None
    return listener


class _HttpServer(uvicorn.Server):
    """uvicorn within a loop that belongs to somebody else: it says when it listens, and leaves the signals alone."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.listening = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.listening.set()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class GatewayService:
    """What `kernelm_sdk.runner.run_service` starts and stops. `listener`: the bound socket for HTTP."""

    def __init__(self, bus: Any, home: Path, settings: GatewaySettings, listener: socket.socket) -> None:
        self.settings, self._listener = settings, listener
        self._file = home / "run" / "gateway.json"
        self._gate = Gate(bus, settings, read_policy(home), home)
        self._budgets: asyncio.Task[None] | None = None
        config = uvicorn.Config(make_app(self._gate), log_config=None, access_log=False, server_header=False, http=Connection,
                                ws="none", lifespan="off", proxy_headers=False, backlog=BACKLOG, timeout_keep_alive=IDLE_S,
                                timeout_graceful_shutdown=GRACE_S,
                                ssl_context_factory=(lambda *_: tls.server_context()) if tls.files() else None)  # fmt: skip
        self._http = _HttpServer(config)
        self._serving: asyncio.Task[None] | None = None
        self._grpc: grpc.aio.Server | None = None

    async def on_start(self) -> None:
        """Listen, then announce."""
        await self._gate.loading.start()
        await self._gate.shadows.start()
        if self.settings.balance:
            await self._gate.balancer.start()
        self._budgets = asyncio.create_task(self._gate.ledger.limits.watch_budgets(), name="budgets")
        host = self.settings.http_host
        self._grpc, grpc_port = await start_grpc(self._gate, host, self.settings.grpc_port)
        self._serving = asyncio.create_task(self._http.serve([self._listener]))
        listening = asyncio.create_task(self._http.listening.wait())
        await asyncio.wait([self._serving, listening], return_when=asyncio.FIRST_COMPLETED)
        if self._serving.done():
            listening.cancel()
            raise ClientFault("port_refused", f"HTTP did not start: {self._serving.exception()}", "see the gateway's log")
        name = f"[{host}]" if ":" in host else host
        scheme = "https" if tls.files() else "http"
        self.announcement = Announcement(f"{scheme}://{name}:{self._listener.getsockname()[1]}", f"{name}:{grpc_port}")
        self._file.parent.mkdir(parents=True, exist_ok=True)
        partial = self._file.with_suffix(".part")
        partial.write_bytes(msgspec.json.encode(self.announcement))
        partial.replace(self._file)

    async def on_stop(self) -> None:
        """Take no more, let what is under way be answered for GRACE_S, and withdraw the announcement."""
        self._file.unlink(missing_ok=True)
        await self._gate.balancer.stop()
        await self._gate.loading.stop()
        self._http.should_exit = True
        if self._serving is not None:
            await self._serving
        if self._grpc is not None:
            await self._grpc.stop(GRACE_S)
        if self._budgets is not None:
            self._budgets.cancel()
        await self._gate.shadows.stop()
        self._gate.ledger.close()
