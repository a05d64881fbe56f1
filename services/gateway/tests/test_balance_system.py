"""Balancing on a real broker: equal beginnings meet in one instance, an instance that goes costs no call, and a pool that took
over gets all of them."""

import asyncio
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from kernelm.testing.harness import System, until
from kernelm_gateway.service import Announcement
from kernelm_sdk.plugin import read_manifest
from kernelm_sdk.system import Destination, Kernel, KeyRequest, Route

ENGINE = Path(__file__).parents[3] / "tests" / "benchmarks" / "mockengine"
sys.path.insert(0, str(ENGINE))
from mock_engine import MockEngine  # noqa: E402

DIGEST = "sha256:" + "aa" * 32
PROMPT = "The same beginning. " * 40


async def instances(system: System, generation: int) -> list[Any]:
    manifest, pool = read_manifest(ENGINE / "kernelm-plugin.toml"), f"twin-g{generation}"
    settings = {"model": {"name": "twin", "artifact": DIGEST, "generation": generation}, "cached": 100, "token_ms": 1.0}
    members = [await system.plugin(MockEngine, manifest, pool=pool, settings=settings, instance=f"{pool}-{k}") for k in range(3)]
    await system.admin.call(Kernel.set_route, Route("twin", "model", (Destination(pool, 100),), generation, DIGEST))
    return members


@pytest.fixture
async def world() -> AsyncIterator[tuple[System, list[Any], httpx.AsyncClient]]:
    async with System() as system:
        members = await instances(system, 1)
        await system.service("gateway", KERNELM_HTTP_PORT="0", KERNELM_GRPC_PORT="0")
        key = (await system.admin.call(Kernel.create_key, KeyRequest("all"))).secret
        said = msgspec.json.decode((system.home / "run" / "gateway.json").read_bytes(), type=Announcement)
        async with httpx.AsyncClient(base_url=said.http, headers={"Authorization": f"Bearer {key}"}, timeout=30) as client:
            yield system, members, client


async def ask(client: httpx.AsyncClient, prompt: str = PROMPT, tokens: int = 1) -> int:
    """The generation that answered."""
    answer = await client.post("/v1/completions", json={"model": "twin", "prompt": prompt, "max_tokens": tokens})
    assert answer.status_code == 200, answer.text
    generation: int = answer.json()["generation"]
    return generation


def read(members: list[Any]) -> list[int]:
    return [member.implementation.read for member in members]


async def test_beginnings_meet_an_instance_goes_and_another_pool_takes_over(world: Any) -> None:
    system, members, client = world

    async def settled() -> bool:
        """Whether one instance alone gets what begins alike."""
        before = read(members)
        for k in range(6):
            await ask(client, f"{PROMPT}{k}")
        return sum(a != b for a, b in zip(before, read(members), strict=True)) == 1

    await until(settled, 20, "one instance for one beginning")
    before = read(members)
    for k in range(12):
        await ask(client, f"{k} other. {PROMPT}")
    assert all(a < b for a, b in zip(before, read(members), strict=True)), "others are spread"

    calls = [asyncio.create_task(ask(client, PROMPT, 30)) for _ in range(20)]
    favourite = max(members, key=lambda member: member.implementation.active)
    await until(lambda: any(m.implementation.active for m in members), 5, "calls under way")
    favourite.stopping.set()
    while favourite.served.tasks or favourite.served.subscriptions:
        calls.append(asyncio.create_task(ask(client, PROMPT, 2)))
        await asyncio.wait([calls[-1]])
    assert set(await asyncio.gather(*calls)) == {1}

    newer = await instances(system, 2)
    await until(lambda: _answers(client, 2), 5, "the newer generation")
    before = read(members)
    assert {await ask(client, f"{PROMPT}{k}") for k in range(20)} == {2}
    assert read(members) == before
    assert sum(read(newer)) > 0


async def _answers(client: httpx.AsyncClient, generation: int) -> bool:
    return await ask(client) == generation
