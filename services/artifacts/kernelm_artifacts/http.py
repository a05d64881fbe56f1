"""Files over HTTP, for machines that don't share the disk: `GET /artifacts/<digest>` (the description) and
`GET /artifacts/<digest>/<path>` (a file, with ranges after RFC 9110, section 14), both with a bearer token that
`artifacts/1.grant` gave for that one artifact and a short time; `PUT /incoming/<name>/<path>` and, once all files are there,
`POST /incoming/<name>`, with one that `artifacts/1.accept` gave.

Starlette's `FileResponse` does ranges, `If-Range` and `HEAD`; the strong `ETag` and `Repr-Digest` (RFC 9530) are the
file's SHA-256, so that a receiver resumes safely and checks what it got.
"""

import asyncio
import base64
import contextlib
import errno
import hashlib
import hmac
import secrets
import socket
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import msgspec
import uvicorn
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, Response
from starlette.routing import Route

from kernelm_artifacts.inbox import Inbox
from kernelm_artifacts.store import Store
from kernelm_sdk import tls
from kernelm_sdk.errors import ClientFault, Fault, KernelFault
from kernelm_sdk.system import Artifact


class Tokens:
    """Bearer tokens without a table: "<expiry>.<HMAC-SHA256 of digest and expiry>" under a key of this process alone,
    so that a restart withdraws them all. What is handed in has a random name in place of a digest."""

    def __init__(self) -> None:
        self._key = secrets.token_bytes(32)

    def issue(self, digest: str, ttl_s: int) -> tuple[str, int]:
        """A token that opens `digest` for `ttl_s` seconds, and its expiry in Unix seconds."""
        expires = int(time.time()) + ttl_s
        return f"{expires}.{self._mac(digest, expires)}", expires

    def check(self, digest: str, authorization: str) -> None:
        """ClientFault "unauthorized" unless the header carries a token for `digest` that has not expired."""
        scheme, _, token = authorization.partition(" ")
        expiry, _, mac = token.strip().partition(".")
        expires = int(expiry) if expiry.isascii() and expiry.isdigit() and len(expiry) < 16 else 0
        genuine = hmac.compare_digest(mac.encode(), self._mac(digest, expires).encode())
        if scheme.lower() != "bearer" or not genuine or expires < time.time():
            raise ClientFault("unauthorized", f"no valid token for {digest}", "get a new one with artifacts/1.grant")

    def _mac(self, digest: str, expires: int) -> str:
        return hmac.new(self._key, f"{digest}\n{expires}".encode(), hashlib.sha256).hexdigest()


def application(store: Store, tokens: Tokens, locate: Callable[[str, str], Awaitable[Path]], inbox: Inbox,
                close: Callable[[str], Awaitable[Artifact]]) -> Starlette:  # fmt: skip
    """The ASGI application over `store`; `locate` says where a file of a digest can be read, `close` stores what came complete."""

    async def describe(request: Request) -> Response:
        digest = request.path_params["digest"]
        tokens.check(digest, request.headers.get("authorization", ""))
        return _json(store.describe(digest))

    async def file(request: Request) -> Response:
        digest, path = request.path_params["digest"], request.path_params["path"]
        tokens.check(digest, request.headers.get("authorization", ""))
        found = next((f for f in store.describe(digest).files if f.path == path), None)  # so no path leads out of the tree
        if found is None:
            raise ClientFault("not_found", f"artifact {digest} has no file {path!r}", "its description lists them")
        sha256 = base64.b64encode(bytes.fromhex(found.sha256)).decode()
        headers = {"etag": f'"{found.sha256}"', "repr-digest": f"sha-256=:{sha256}:", "x-content-type-options": "nosniff",
                   "cache-control": "private, immutable"}  # fmt: skip
        return FileResponse(await locate(digest, path), headers=headers, media_type="application/octet-stream")

    async def take(request: Request) -> Response:
        name, path = request.path_params["name"], request.path_params["path"]
        tokens.check(name, request.headers.get("authorization", ""))
        await inbox.write(name, path, request.stream())
        return Response(status_code=204)

    async def finish(request: Request) -> Response:
        name = request.path_params["name"]
        tokens.check(name, request.headers.get("authorization", ""))
        return _json(await close(name))

    async def left(request: Request, gone: Exception) -> Response:
        return Response(status_code=400)  # to nobody

    async def refuse(request: Request, fault: Exception) -> Response:
        assert isinstance(fault, Fault)
        headers = {"www-authenticate": "Bearer"} if fault.http_status == 401 else {}
        return _json(fault.body(), fault.http_status, headers)

    routes = [Route("/artifacts/{digest}", describe), Route("/artifacts/{digest}/{path:path}", file),
              Route("/incoming/{name}", finish, methods=["POST"]),
              Route("/incoming/{name}/{path:path}", take, methods=["PUT"])]  # fmt: skip
    return Starlette(routes=routes, exception_handlers={Fault: refuse, ClientDisconnect: left})


def _json(body: msgspec.Struct, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(body), status, headers, "application/json")


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are the service's, which stops this server itself."""
        yield


class FileServer:
    """The application on a socket. `port` 0 takes a free one; KernelFault "port_taken" when a given one is not free."""

    def __init__(self, app: Starlette, host: str, port: int) -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._socket = socket.socket(family, socket.SOCK_STREAM)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            self._socket.bind((host, port))
        except OSError as error:
            self._socket.close()
            code = "port_taken" if error.errno == errno.EADDRINUSE else "can_not_listen"
            raise KernelFault(code, f"the artifacts service can't listen on {host}:{port}: {error.strerror}",
                              "choose another KERNELM_ARTIFACTS_PORT, or 0 for a free one") from None  # fmt: skip
        bound = self._socket.getsockname()[1]
        encrypted = tls.files() is not None
        name = f"[{host}]" if family == socket.AF_INET6 else host
        self.url = f"{'https' if encrypted else 'http'}://{name}:{bound}"
        context = (lambda *_: tls.server_context(mutual=True)) if encrypted else None
        self._server = _Server(uvicorn.Config(app, log_config=None, access_log=False, lifespan="off", server_header=False,
                                              timeout_graceful_shutdown=5, ssl_context_factory=context))  # fmt: skip
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Serve from now on: the socket listens when this returns."""
        self._socket.listen(128)
        self._task = asyncio.create_task(self._server.serve(sockets=[self._socket]), name="artifacts-http")

    async def stop(self) -> None:
        """Finish the requests at work within 5 s, and close."""
        self._server.should_exit = True
        if self._task is not None:
            await self._task
        self._socket.close()
