"""make bench-tracing: what traces at full sampling cost calls of 5 ms.

One server process with two instances, one on the bus as it is and one on the bus that traces; one client with a connection of
each kind; a third process receives the spans (OTLP over HTTP). A traced call is three spans: the request at the door, the call,
its handler. Each call computes for 5 ms (PBKDF2 in a worker thread, one at a time, as a model on a processor does). Turns of
the two alternate within a round; the ratio compares the medians of the rounds. What traces cost in processor time, of client and
server together, is told beside it: that hardly depends on what else the machine does.
"""

import asyncio
import hashlib
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import msgspec
import psutil
import uvloop

from kernelm.testing.harness import System
from kernelm_authority.identity import Grant
from kernelm_sdk import spans, tracing
from kernelm_sdk.bus import Bus, Credentials, handlers_of
from kernelm_sdk.contract import Contract, method_of, unary
from kernelm_sdk.system import ContractVersion, Hello, Kernel, Ready

sys.path.insert(0, str(Path(__file__).parent))
from reporting import conditions, finish, median, processor_s, say

ROUNDS = int(os.environ.get("ROUNDS", "15"))
TURN_S = float(os.environ.get("TURN_S", "2"))
IN_FLIGHT = 4
WORK_S = 0.005
STEP = 100  # iterations of PBKDF2 between two looks at the clock: some 50 us


class BenchText(msgspec.Struct, frozen=True):
    text: str


class TracedBench(Contract, name="traced-bench", major=1):
    @unary
    async def infer(self, request: BenchText, call: Any) -> BenchText: ...


class InferenceServer:
    def __init__(self) -> None:
        self._worker = ThreadPoolExecutor(1)

    async def infer(self, request: BenchText, call: Any) -> BenchText:
        await asyncio.get_running_loop().run_in_executor(self._worker, compute)
        return request


def compute() -> None:
    """Occupy a core for WORK_S of processor time, without the interpreter's lock."""
    begun = time.thread_time()
    while time.thread_time() - begun < WORK_S:
        hashlib.pbkdf2_hmac("sha256", b"text", b"salt", STEP)


async def serve(url: str, path: str) -> None:
    plain, traced = msgspec.json.decode(Path(path).read_bytes(), type=tuple[Credentials, Credentials])
    server = InferenceServer()
    for kind, credentials in ((Bus, plain), (spans.TracedBus, traced)):
        bus = await kind.connect(url, credentials)
        version = ContractVersion("traced-bench/1", TracedBench.schema_hash())
        await bus.call(Kernel.hello, Hello(credentials.user, "bench", "1", (version,)))
        await bus.serve(handlers_of(server, "traced-bench/1"), pool=credentials.user, instance=credentials.user)
        await bus.call(Kernel.ready, Ready(credentials.user))
    await asyncio.Event().wait()


def collect() -> None:
    """Receive spans and throw them away."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    print(server.server_address[1], flush=True)
    server.serve_forever()


async def identity(system: System, name: str) -> Credentials:
    bus = await system.connect(name, Grant("service", name, pool=name))
    await bus.close()
    return bus.credentials


async def turn(bus: Bus, instance: str, server: psutil.Process) -> tuple[float, float]:
    """(calls a second with IN_FLIGHT at once, us of processor time a call beyond its work)"""
    until, done, body = time.perf_counter() + TURN_S, 0, BenchText("Shares rose after the merger. " * 10)
    method, traced = method_of(TracedBench.infer), isinstance(bus, spans.TracedBus)

    async def ask() -> None:
        await bus.call(TracedBench.infer, body, instance=instance)

    async def caller() -> None:
        nonlocal done
        while time.perf_counter() < until:
            if traced:
                with tracing.door(bus, method):  # as the gateway does
                    await ask()
            else:
                await ask()
            done += 1

    begun, used = time.perf_counter(), spent_s(server)
    await asyncio.gather(*(caller() for _ in range(IN_FLIGHT)))
    return done / (time.perf_counter() - begun), ((spent_s(server) - used) / done - WORK_S) * 1e6


def spent_s(server: psutil.Process) -> float:
    """Processor time of this process and the server."""
    return time.process_time() + processor_s(server)


async def main() -> None:
    collector = subprocess.Popen([sys.executable, __file__, "collect"], stdout=subprocess.PIPE, text=True)
    assert collector.stdout is not None
    endpoint = f"http://127.0.0.1:{int(collector.stdout.readline())}"
    async with System(kernel="process") as system:
        path = system.home / "bench.json"
        path.write_bytes(msgspec.json.encode((await identity(system, "plain"), await identity(system, "traced"))))
        os.environ["OTEL_EXPORTER_OTLP_ENDPOINT"] = endpoint  # for the server and the traced connections alone
        command = [sys.executable, __file__, "serve", system.broker.url, str(path)]
        server = subprocess.Popen(command)
        for name in ("plain", "traced"):
            await system.ready(name, 60)
        plain = await system.track(Bus.connect(system.broker.url, system.authority.credentials("caller-plain")))
        traced = await system.track(spans.TracedBus.connect(system.broker.url, system.authority.credentials("caller-traced")))
        system.processes["kernelm"].send_signal(signal.SIGSTOP)  # it is not in the path, and would miss the leases
        rates: dict[str, list[float]] = {"plain": [], "traced": []}
        costs: dict[str, list[float]] = {"plain": [], "traced": []}
        for number in range(ROUNDS + 1):
            pairs = [("plain", plain), ("traced", traced)]
            for name, bus in pairs if number % 2 else pairs[::-1]:
                rate, cost = await turn(bus, name, psutil.Process(server.pid))
                if number:  # the first round warms up
                    rates[name].append(rate)
                    costs[name].append(cost)
            if number:
                say(f"round {number}/{ROUNDS}: {rates['plain'][-1]:.1f} calls/s, traced {rates['traced'][-1]:.1f}; "
                    f"processor beyond the work {costs['plain'][-1]:.0f} us a call, traced {costs['traced'][-1]:.0f}")
        server.terminate()
        server.wait()
        system.processes["kernelm"].send_signal(signal.SIGCONT)
    spans.provider("caller-traced").shutdown()
    collector.terminate()
    loss = 1 - median([t / p for p, t in zip(rates["plain"], rates["traced"], strict=True)])
    where = conditions("nats-py", "opentelemetry-sdk", rounds=ROUNDS, turn_s=TURN_S, in_flight=IN_FLIGHT, work_ms=WORK_S * 1e3)
    finish("tracing", {"throughput_loss": loss}, where, calls_per_s={k: round(median(v), 1) for k, v in rates.items()},
           processor_us_a_call={k: round(median(v), 1) for k, v in costs.items()})  # fmt: skip


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["serve", url, path]:
            uvloop.run(serve(url, path))
        case ["collect"]:
            collect()
        case _:
            uvloop.run(main())
