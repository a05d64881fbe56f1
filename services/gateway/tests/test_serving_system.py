"""Serving through a real broker, kernel and gateway process: events that were missed, the time that an answer may take, and what is
said of a model that is still loading."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import msgspec
import pytest

from kernelm.testing.harness import System, until
from kernelm_contracts.server import GenerateFrame, GenerateRequest, ModelLoading, Server, Usage
from kernelm_gateway.service import Announcement
from kernelm_sdk.errors import KernelFault
from kernelm_sdk.plugin import Manifest, Plugin
from kernelm_sdk.system import Destination, Kernel, KeyRequest, Route

MANIFEST = Manifest("endless", "1", "goes on for ever", ("server/1",), "x:Y", events=("model.loading",))


class Endless(Plugin, Server):
    """Generates until nobody listens any more, and tells how far it is with loading."""

    under_way = 0

    def models(self) -> tuple[str, ...]:
        return ("endless", "waking")

    async def generate(self, request: GenerateRequest, call: Any) -> AsyncIterator[GenerateFrame]:
        if call.model == "waking":
            for fraction, phase in ((0.25, "reading"), (0.5, "compiling")):
                loading = ModelLoading(model="waking", generation=3, pool="p", fraction=fraction, phase=phase)
                await self.context.publish(loading)
            raise KernelFault("starting", "it had no calls for a while", "call again", retriable=True, retry_after_s=4.0)
        Endless.under_way += 1
        try:
            while True:
                yield GenerateFrame("word ")
                await asyncio.sleep(0.02)
        finally:
            Endless.under_way -= 1
        yield GenerateFrame("", "stop", Usage(1, 1), call.model, 1, "sha256:0")


@pytest.fixture
async def system() -> AsyncIterator[System]:
    async with System() as system:
        await system.plugin(Endless, MANIFEST)
        for name in ("endless", "waking"):
            await system.admin.call(Kernel.set_route, Route(name, "model", (Destination("endless", 100),), 1, "sha256:0"))
        settings = {"HTTP_PORT": "0", "GRPC_PORT": "0", "ANSWER_S": "1", "START_WAIT_S": "0"}
        await system.service("gateway", **{f"KERNELM_{name}": value for name, value in settings.items()})
        yield system


async def client(system: System, admin: bool = False) -> httpx.AsyncClient:
    made = await system.admin.call(Kernel.create_key, KeyRequest("acme", admin=admin))
    where = msgspec.json.decode((system.home / "run" / "gateway.json").read_bytes(), type=Announcement)
    return httpx.AsyncClient(base_url=where.http, headers={"authorization": f"Bearer {made.secret}"}, trust_env=False, timeout=30)


def chat(model: str = "endless", stream: bool = True) -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": "Hello"}], "stream": stream}


async def test_an_answer_ends_at_its_time_and_so_does_the_engine(system: System) -> None:
    async with await client(system) as caller:
        for headers, seconds in (({}, 1.0), ({"kernelm-timeout": "0.3"}, 0.3), ({"kernelm-timeout": "2"}, 2.0)):
            await ends(caller, headers, seconds)
        await until(lambda: Endless.under_way == 0, 10, "the engine's end")
        for text in ("soon", "-1", "0", "nan", "inf", "1e9", "2 s"):
            refused = await caller.post("/v1/chat/completions", json=chat(), headers={"kernelm-timeout": text})
            assert (refused.status_code, refused.json()["error"]["param"]) == (400, "kernelm-timeout")


async def ends(caller: httpx.AsyncClient, headers: dict[str, str], seconds: float) -> None:
    whole = await caller.post("/v1/chat/completions", json=chat(stream=False), headers=headers)
    assert (whole.status_code, whole.json()["error"]["code"]) == (504, "timeout")
    assert f"longer than {seconds:g} s" in whole.json()["error"]["message"]
    streamed = await caller.post("/v1/chat/completions", json=chat(), headers=headers)
    *words, last = [json.loads(line[6:]) for line in streamed.text.splitlines() if line.startswith("data: ")]
    assert (streamed.status_code, last["error"]["code"], bool(words)) == (200, "timeout", True)


async def test_a_model_that_is_loading_says_how_far_it_is(system: System) -> None:
    async with await client(system) as caller:

        async def told() -> bool:
            answer = await caller.post("/v1/chat/completions", json=chat("waking"))
            error = answer.json()["error"]
            assert (answer.status_code, error["code"], error["retriable"]) == (503, "starting", True)
            assert 1 <= int(answer.headers["Retry-After"]) <= 60
            return error.get("progress") == {"fraction": 0.5, "phase": "compiling", "generation": 3} and "50%" in error["message"]

        await until(told, 20, "the progress")


async def test_who_comes_again_gets_the_events_that_it_has_missed(system: System) -> None:
    """Exactly those behind the last one that it knows, in their order, and then what happens."""
    async with await client(system, admin=True) as caller:
        before = await heard(caller, 1, lambda: route(system, "news-1"))
        for number in (2, 3):
            await route(system, f"news-{number}")
        again = await heard(caller, 3, lambda: route(system, "news-4"), {"Last-Event-ID": before[0][0]})
        assert [event["data"]["route"]["name"] for _, event in [*before, *again]] == [f"news-{k}" for k in (1, 2, 3, 4)]
        unknown = before[0][0].replace(before[0][1]["id"], "kernel.gone.1")
        assert len(await heard(caller, 4, lambda: asyncio.sleep(0), {"Last-Event-ID": unknown})) == 4, "all since its time"
        for nonsense in ("x", "kernel.gone.1", "2026-99-99T00:00:00Z kernel.gone.1"):
            refused = await caller.get("/v1/events", headers={"Last-Event-ID": nonsense})
            assert (refused.status_code, refused.json()["error"]["param"]) == (400, "Last-Event-ID")


async def route(system: System, name: str) -> None:
    await system.admin.call(Kernel.set_route, Route(name, "model", (Destination("endless", 100),), 1, "sha256:0"))


async def heard(caller: httpx.AsyncClient, count: int, act: Any, headers: dict[str, str] | None = None) -> list[Any]:
    """(id, event) of so many changes of routes, the last of which `act` makes once the client listens."""
    found: list[tuple[str, Any]] = []
    async with asyncio.timeout(60), caller.stream("GET", "/v1/events?type=route.changed", headers=headers or {}) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        identifier = ""
        async for line in response.aiter_lines():
            if line == ": listening":
                await act()
            elif line.startswith("id: "):
                identifier = line[4:]
            elif line.startswith("data: "):
                found.append((identifier, json.loads(line[6:])))
                if len(found) == count:
                    break
    return found
