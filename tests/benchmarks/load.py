"""An open-loop load generator, in a process of its own: `python load.py plan.json`.

Requests leave at a fixed rate whether or not answers come, and a latency counts from when the request was due, so that a
stall is seen by all requests that fall into it (no coordinated omission). It speaks the NATS protocol itself, since on a
machine of few cores a client library's share of the time would be most of what is measured. It stops at SIGTERM, gives
what is under way PATIENCE_S, and writes two arrays: when each request was due (time.monotonic, which all processes of a
machine share) and the seconds until its answer (NONE without one, REFUSED for a fault).
"""

import asyncio
import base64
import json
import signal
import subprocess
import sys
import time
from array import array
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
import nkeys
import uvloop

NONE, REFUSED = -1.0, -2.0
PATIENCE_S = 10.0
TICK_S = 0.001
SAY_S = 0.5  # between two lines on stdout of how it stands


class Plan(msgspec.Struct, frozen=True):
    """Who sends what where, how often."""

    host: str
    port: int
    user: str
    jwt: str
    seed: str
    subject: str
    rate: float  # requests/s
    text: str  # part of each request, beside its number
    out: str  # the arrays go to <out>.due and <out>.took
    members: str = ""  # JSON members of each request in place of the text


class Standing(msgspec.Struct, frozen=True):
    """One line on stdout."""

    sent: int
    answered: int
    refused: int
    faults: dict[str, int]  # code -> how many


class Wire(asyncio.Protocol):
    """As much of the NATS client protocol as requests and replies need."""

    def __init__(self, plan: Plan) -> None:
        self._plan, self._buffer = plan, b""
        self.ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.lost = ""
        self.due, self.took = array("d"), array("d")
        self.answered = self.refused = 0
        self.finished: asyncio.Future[None] | None = None  # set once no more are sent: all are answered
        self.faults: Counter[str] = Counter()
        self._inbox = f"_INBOX.{plan.user}.load."
        self._head = f"PUB {plan.subject} {self._inbox}"
        self._tail = "," + (plan.members or f'"text":{json.dumps(plan.text)}') + "}"

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost = self.lost or f"the connection was lost: {exc or 'closed by the broker'}"

    def send(self, due: float) -> bytes:
        """The request with the next number, to be written; it counts from `due`."""
        number = len(self.due)
        self.due.append(due)
        self.took.append(NONE)
        body = f'{{"id":{number}{self._tail}'
        return f"{self._head}{number} {len(body)}\r\n{body}\r\n".encode()

    def write(self, data: bytes) -> None:
        self._transport.write(data)  # type: ignore[attr-defined]

    def data_received(self, data: bytes) -> None:
        now = time.monotonic()
        buffer, at = self._buffer + data if self._buffer else data, 0
        while (end := buffer.find(b"\r\n", at)) >= 0:
            line = buffer[at:end]
            if line[:4] == b"MSG " or line[:5] == b"HMSG ":
                parts = line.split()
                size = int(parts[-1])
                if len(buffer) < end + 4 + size:
                    break
                number = int(parts[1].rpartition(b".")[2])
                if line[:1] == b"M":
                    self._answered(number, now)
                else:
                    head = int(parts[-2])
                    self._with_headers(number, now, buffer[end + 2 : end + 2 + head], buffer[end + 2 + head : end + 2 + size])
                at = end + 4 + size
            else:
                self._control(line)
                at = end + 2
        self._buffer = buffer[at:]

    def _answered(self, number: int, now: float) -> None:
        self.took[number] = now - self.due[number]
        self.answered += 1
        self.look()

    def look(self) -> None:
        """Whether all that was sent has its answer."""
        if self.finished and not self.finished.done() and self.answered + self.refused == len(self.due):
            self.finished.set_result(None)

    def _with_headers(self, number: int, now: float, headers: bytes, body: bytes) -> None:
        status = headers[:20].split(b"\r\n")[0].split()[1:]
        if not status and b"Nats-Service-Error-Code" not in headers:
            self._answered(number, now)
            return
        self.took[number] = REFUSED
        self.refused += 1
        self.faults["no_responders" if status else json.loads(body).get("code", "?")] += 1
        self.look()

    def _control(self, line: bytes) -> None:
        if line.startswith(b"PING"):
            self.write(b"PONG\r\n")
        elif line.startswith(b"PONG") and not self.ready.done():
            self.ready.set_result(None)
        elif line.startswith(b"-ERR"):
            self.lost = line.decode()
        elif line.startswith(b"INFO"):
            nonce = json.loads(line[5:])["nonce"]
            signature = base64.urlsafe_b64encode(nkeys.from_seed(self._plan.seed.encode()).sign(nonce.encode())).rstrip(b"=")
            hello = {"verbose": False, "pedantic": False, "lang": "python", "version": "1", "headers": True, "no_responders": True,
                     "jwt": self._plan.jwt, "sig": signature.decode(), "name": self._plan.user}  # fmt: skip
            self.write(f"CONNECT {json.dumps(hello)}\r\nSUB {self._inbox}* 1\r\nPING\r\n".encode())


async def run(plan: Plan) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    _, wire = await loop.create_connection(lambda: Wire(plan), plan.host, plan.port)
    await asyncio.wait_for(wire.ready, 10.0)
    begun = said = time.monotonic()
    while not stop.is_set():
        now = time.monotonic()
        wanted, count = int((now - begun) * plan.rate), len(wire.due)
        if wanted > count:
            wire.write(b"".join([wire.send(begun + k / plan.rate) for k in range(count, wanted)]))
        if wire.lost:
            sys.exit(wire.lost)
        if now - said > SAY_S:
            said = now
            _say(wire)
        await asyncio.sleep(TICK_S)
    wire.finished = loop.create_future()
    wire.look()
    await asyncio.wait([wire.finished], timeout=PATIENCE_S)
    for name in ("due", "took"):
        with Path(f"{plan.out}.{name}").open("wb") as file:
            getattr(wire, name).tofile(file)
    _say(wire)


def _say(wire: Wire) -> None:
    standing = Standing(len(wire.due), wire.answered, wire.refused, dict(wire.faults))
    print(msgspec.json.encode(standing).decode(), flush=True)


class Load:
    """The generator as the benchmark sees it: `async with Load(plan) as load`, then `await load.end()`."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.standing = plan, Standing(0, 0, 0, {})
        self.due, self.took = array("d"), array("d")

    async def __aenter__(self) -> "Load":
        path = Path(f"{self.plan.out}.json")
        path.touch(mode=0o600)
        path.write_bytes(msgspec.json.encode(self.plan))
        self.process = await asyncio.create_subprocess_exec(sys.executable, __file__, str(path), stdout=subprocess.PIPE)
        self._reader = asyncio.create_task(self._read())
        return self

    async def _read(self) -> None:
        assert self.process.stdout is not None
        async for line in self.process.stdout:
            self.standing = msgspec.json.decode(line, type=Standing)

    async def end(self) -> None:
        """Stop, wait for the last answers, read what was measured."""
        self.process.terminate()
        await self._reader
        if await self.process.wait():
            raise RuntimeError("the load generator failed: see above")
        for name in ("due", "took"):
            path = Path(f"{self.plan.out}.{name}")
            with path.open("rb") as file:
                getattr(self, name).fromfile(file, path.stat().st_size // 8)

    @property
    def lost(self) -> int:
        """Requests without an answer, refused ones among them."""
        return sum(t < 0 for t in self.took)

    def within(self, spans: list[tuple[float, float]]) -> list[float]:
        """Seconds of the answered requests that were due in one of `spans` (time.monotonic)."""
        found: list[float] = []
        k, due = 0, self.due
        for begin, end in sorted(spans):
            while k < len(due) and due[k] < begin:
                k += 1
            while k < len(due) and due[k] < end:
                if self.took[k] >= 0:
                    found.append(self.took[k])
                k += 1
        return found

    async def __aexit__(self, *_: Any) -> None:
        if self.process.returncode is None:
            self.process.kill()
            await self.process.wait()
        for path in Path(self.plan.out).parent.glob(f"{Path(self.plan.out).name}.*"):
            path.unlink()


if __name__ == "__main__":
    uvloop.run(run(msgspec.json.decode(Path(sys.argv[1]).read_bytes(), type=Plan)))
