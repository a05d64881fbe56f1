"""How a bus goes from one connection to the next without losing or doubling a message: links, and subscriptions that move.

A connection ends with the JWT it was opened under, so it is replaced before: the next one is opened, the subscriptions
are opened there, those on the old one are closed, and the old one is kept as long as anything waits for an answer on it.
"""

import asyncio
import base64
import contextlib
import logging
import secrets
import ssl
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import msgspec
import nkeys

from kernelm_sdk.errors import ClientFault, Fault, KernelFault
from kernelm_sdk.serving import Direct
from kernelm_sdk.tls import client_context, fault_of, of_handshake, refresh

if TYPE_CHECKING:
    from kernelm_sdk.bus import Bus

LARGEST_BACKLOG = 2**27  # bytes that may wait for one handler
GREETING_S = 5  # until the broker has greeted us over TLS, perhaps through a relay: as long as it waits itself (nats-py: 2 s)
CLOSE_S = 5  # nats-py waits without bound for the end of a TLS connection, which may never be told
SHUT_OUT = 5  # refusals in a row, a tenth of a second apart, after which a connection counts as closed for good
log = logging.getLogger("kernelm.bus")


class Credentials(msgspec.Struct):
    """Who connects: the name that the JWT fixes, the JWT, and the seed that signs the server's nonce."""

    user: str
    jwt: str
    seed: str
    expires: int = 0  # Unix seconds; 0 for never

    def __repr__(self) -> str:  # neither may come into a log or an error by an accident
        return f"Credentials(user={self.user!r}, expires={self.expires})"


class Link:
    """One connection under one JWT, and the inbox that only it listens on. The name of the inbox holds 128 random bits and
    is never published; who is asked something learns it, so each request in it has a name of its own (`Bus._token`)."""

    def __init__(self, client: Any, credentials: Credentials) -> None:
        self.client, self.credentials = client, credentials
        self.inbox = f"_INBOX.{credentials.user}.{secrets.token_hex(16)}"
        self.held: set[str] = set()  # streams that still expect acknowledgements here
        self.gone = asyncio.Event()  # it is closed for good
        self._own: ssl.SSLContext | None = None  # of the environment's certificates
        client._close = self._closing(client._close)

    def _closing(self, close: Callable[..., Awaitable[None]]) -> Callable[..., Awaitable[None]]:
        """What nats-py does to close, after having said so: its own callback does not come when the broker has shut us out."""

        async def closing(status: int, do_cbs: bool = True) -> None:
            if status == self.client.CLOSED:
                self.gone.set()
            await close(status, do_cbs)

        return closing

    def jwt(self) -> bytearray:
        return bytearray(self.credentials.jwt.encode())

    def sign(self, nonce: str) -> bytes:
        return base64.b64encode(nkeys.from_seed(self.credentials.seed.encode()).sign(nonce.encode()))

    async def connect(self, url: str, timeout_s: float, tls: ssl.SSLContext | None, hopeless: asyncio.Event,
                      **options: Any) -> None:  # fmt: skip
        """Connect within `timeout_s`, or raise TimeoutError or what nats-py raises; it tries again until then or `hopeless`. With
        "tls://" no byte goes in the clear: the broker's greeting could be another's, who says that it needs no TLS."""
        first = url.startswith("tls:")
        self._own = client_context() if first and tls is None else None
        options |= {"tls": tls or self._own, "tls_handshake_first": first, "connect_timeout": GREETING_S}
        connecting = asyncio.create_task(self.client.connect(url, **options))
        ending = asyncio.create_task(hopeless.wait())
        try:
            await asyncio.wait([connecting, ending], timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
            if not connecting.done():
                raise TimeoutError
            connecting.result()
        finally:
            ending.cancel()
            await _end(connecting)

    def lost(self) -> None:
        """nats-py will connect again: with the certificates that lie there by then."""
        if self._own is not None:
            try:
                refresh(self._own)
            except ClientFault as fault:
                log.error("%s: %s", self.credentials.user, fault)

    async def barrier(self) -> None:
        """All that was sent before has reached the broker, and all that the broker sent before is handled. nats-py's flush
        writes its ping past the commands that wait in its buffer, so one flush proves nothing; the second one's ping follows
        them. KernelFault "disconnected" when there is no broker."""
        try:
            await self.client.flush()
            await self.client.flush()
        except Exception as error:
            raise KernelFault("disconnected", f"no answer of the broker: {error or type(error).__name__}", retriable=True) from None

    async def close(self, flush_s: int = 2) -> None:
        with contextlib.suppress(Exception):  # a dead broker must not keep anybody from ending
            await self.client.flush(flush_s)
        with contextlib.suppress(Exception):
            async with asyncio.timeout(CLOSE_S):
                await self.client.close()
        if self.client._reconnection_task is not None:  # after a refusal nats-py may go on reconnecting in the background
            await _end(self.client._reconnection_task)


async def _end(task: asyncio.Task[None]) -> None:
    """Cancel a task of nats-py's: its loops may swallow a cancellation, so it is said until it is heard."""
    while not task.done() and task is not asyncio.current_task():
        task.cancel()
        await asyncio.wait([task], timeout=0.1)


class Refusals:
    """Tells a broker that refuses us from one that is away. It closes the connection of whom it refuses, and the reset may
    overtake the reason."""

    def __init__(self) -> None:
        self.hopeless = asyncio.Event()  # a certificate is no matter of time
        self.clear()
        self._admitted = False

    def clear(self) -> None:
        """It has let us in."""
        self._row, self._told, self.last, self._admitted = 0, False, "", True
        self._tls: Exception | None = None

    def fault(self, error: Exception, url: str, user: str) -> Fault:
        """Why nobody was let in, when trying has ended with `error`."""
        if isinstance(error, Fault):
            return error
        if self._tls or of_handshake(error):
            return fault_of(self._tls or error, f"the broker at {url}")
        cause = self.last or str(error) or type(error).__name__
        if self.refused:
            return ClientFault("unauthorized", f"the broker at {url} refused {user!r}: {cause}",
                               "the key is wrong, expired or revoked: get a new one")  # fmt: skip
        return KernelFault("broker_unreachable", f"no broker at {url}: {cause}", "is `kernelm up` running?", retriable=True)

    @property
    def refused(self) -> bool:
        return self._told or self._row >= SHUT_OUT

    def note(self, error: Exception) -> bool:
        """Whether the connection counts as closed for good, after `error`. Who was let in before waits for a new certificate."""
        if of_handshake(error):
            self._tls = error
            if not self._admitted:
                self.hopeless.set()
            return False
        text = str(error) or type(error).__name__
        told = "authorization violation" in text.lower()
        if told or isinstance(error, ConnectionResetError | ssl.SSLError):
            self._row += 1
            self.last = text if told or not self._told else self.last
            self._told = self._told or told
        elif isinstance(error, ConnectionRefusedError):  # nobody is there
            self._row, self._told, self.last = 0, False, text
        else:
            self.last = self.last or text
        return self._row > 0 and self._row % SHUT_OUT == 0


class Subscription:
    """A subscription that outlives the connection it was opened on. In a queue group both connections may be subscribed at
    the same time, since the broker gives a message to one of them; without one (`queue` "") messages come in order, and
    those of the new connection wait until the old one is done and are dropped if they came there too."""

    def __init__(self, bus: "Bus", subject: str, queue: str, handler: Callable[[Any], Awaitable[None]] | None,
                 direct: Callable[[Any], None] | None = None) -> None:  # fmt: skip
        self.subject, self.queue, self._bus, self._handler = subject, queue, bus, handler
        self._deliver = direct or self._enqueue
        self._natives: dict[Link, Any] = {}
        self._next: Link | None = None  # during a move: where to
        self._ahead: list[Any] = []  # what came there already
        self._seen: set[str | None] = set()  # ids of what came on the old one meanwhile; copies may come even later
        self._backlog: asyncio.Queue[Any] = asyncio.Queue()
        self._bytes = 0
        self._worker = asyncio.create_task(self._work()) if handler else None

    async def open(self, link: Link, moving: bool = False) -> None:
        """Subscribe on `link`; with `moving` beside the connection that is subscribed already."""
        if moving:
            self._next, self._ahead, self._seen = link, [], set()
        native = await link.client.subscribe(self.subject, queue=self.queue, pending_bytes_limit=0)
        self._natives[link] = native
        Direct.replace(native, self._deliver if self.queue else partial(self._arrive, link))

    async def leave(self, link: Link) -> None:
        """Have the broker send nothing more there; what it has sent is handled once the link's barrier is passed."""
        if (native := self._natives.get(link)) is not None and not link.client.is_closed:
            await link.client._send_unsubscribe(native._id)

    def left(self, link: Link) -> None:
        """The barrier behind `leave` is passed: what waited for it comes now."""
        if (native := self._natives.pop(link, None)) is not None:
            link.client._remove_sub(native._id)
        ahead = [] if link is self._next else self._ahead
        self._next, self._ahead = None, []
        for msg in ahead:
            self._arrive(None, msg)

    def _arrive(self, link: Link | None, msg: Any) -> None:
        if link is not None and link is self._next:
            self._ahead.append(msg)
            return
        identity = (msg.headers or {}).get("Nats-Msg-Id")
        if self._next is not None:
            self._seen.add(identity)
        elif identity is not None and identity in self._seen:  # the copy of one that came on the old connection
            return
        self._deliver(msg)

    def _enqueue(self, msg: Any) -> None:
        if self._bytes + len(msg.data) > LARGEST_BACKLOG:
            log.warning("%s: %d bytes wait for the handler; a message is dropped", self.subject, self._bytes)
            return
        self._bytes += len(msg.data)
        self._backlog.put_nowait(msg)

    async def _work(self) -> None:
        """Handle one message after another."""
        assert self._handler is not None
        while True:
            msg = await self._backlog.get()
            self._bytes -= len(msg.data)
            try:
                await self._handler(msg)
            except Exception:  # a bug of the handler must not end the subscription
                log.exception("the handler of %s failed", self.subject)

    async def unsubscribe(self) -> None:
        """No more messages, not even those that wait."""
        self.stop()
        await self._bus.unsubscribe(self)

    def stop(self) -> None:
        if self._worker is not None:
            self._worker.cancel()
