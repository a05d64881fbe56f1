"""Deployments as clients of the gateway see them, through a real broker, kernel, job service and gateway: a generation that has
a share of the calls only, and shadows, which nobody notices."""

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator
from typing import Any
from unittest.mock import ANY

import httpx
import msgspec
import psutil
import pytest

from kernelm.testing.harness import until
from kernelm_cli.home import UpFile, write_up
from kernelm_contracts.jobs import Jobs
from kernelm_contracts.shadows import Compared, Copies, Shadow, ShadowRequest
from kernelm_contracts.usage import UsageQuery
from kernelm_gateway.service import Announcement
from kernelm_sdk.errors import ClientFault
from kernelm_sdk.system import Kernel, KeyRequest

Kit = Any  # of conftest.py, which can't be imported


@pytest.fixture
async def caller(kit: Kit) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the gateway of a system whose scheduler runs."""
    await kit.pools("scheduler")
    await kit.system.service("gateway", KERNELM_HTTP_PORT="0", KERNELM_GRPC_PORT="0", KERNELM_START_WAIT_S="20")
    made = await kit.bus.call(Kernel.create_key, KeyRequest("acme", tenant="acme"))
    where = msgspec.json.decode((kit.system.home / "run" / "gateway.json").read_bytes(), type=Announcement)
    key = {"authorization": f"Bearer {made.secret}"}
    async with httpx.AsyncClient(base_url=where.http, headers=key, trust_env=False, timeout=30) as client:
        yield client


async def generation(caller: httpx.AsyncClient, at_least: int) -> Any:
    answer = await caller.post("/v1/classify", json={"model": "news", "input": "text", "at_least": at_least})
    return answer.json().get("generation") or answer.json()["error"]["code"]


async def test_who_has_deployed_gets_that_generation_while_it_has_a_share_only(kit: Kit, caller: httpx.AsyncClient) -> None:
    await kit.end((await kit.submit(kit.deploy("m1"))).id)
    assert await generation(caller, 2) == "stale_generation", "nobody is on the way there: at once"
    run = await kit.submit(kit.deploy("m2", canary=5, watch_s=60.0))
    await kit.job(f"{run.id}-deploy", lambda j: j.progress.phase == "watching")
    assert {await generation(caller, 2) for _ in range(20)} == {2}
    assert 1 in {await generation(caller, 1) for _ in range(40)}, "who does not ask for it gets its share"
    assert await generation(caller, 3) == "stale_generation"


async def shadow(kit: Kit) -> Shadow:
    found, _ = await kit.bus.bucket("deployments", Shadow).get("shadow.news")
    assert found is not None
    return found


async def test_a_shadow_answers_copies_that_are_counted_and_nobody_notices(kit: Kit, caller: httpx.AsyncClient) -> None:
    for name, model in (("news", "m1"), ("next", "dull"), ("worse", "failing")):
        await kit.end((await kit.submit(kit.deploy(model, name=name), name=name)).id)
    await kit.bus.call(Jobs.shadow, ShadowRequest("news", "next", 100, "is it as bright?"))

    async def known(to: str) -> bool:
        shown = (await caller.get("/v1/deployments")).json()["deployments"]
        return any(d["route"]["name"] == "news" and d["shadow"] and d["shadow"]["to"] == to for d in shown)

    async def counted(wanted: Copies) -> bool:
        copies = (await shadow(kit)).copies
        return (copies.same, copies.different, copies.failed) == (wanted.same, wanted.different, wanted.failed)

    await until(lambda: known("next"), 20, "the gateway's look at the record")
    assert {await generation(caller, 1) for _ in range(10)} == {1}
    await until(lambda: counted(Copies(different=10)), 20, "ten copies")
    assert (await shadow(kit)).copies.took_ms > 0
    usage = await kit.bus.call(Jobs.usage, UsageQuery("acme"))
    assert {model for day in usage.days for model in day.usage.calls} <= {"news"}, "copies are on nobody's account"
    await kit.bus.call(Jobs.shadow, ShadowRequest("news", "worse", 100))
    await until(lambda: known("worse"), 20, "the other shadow")
    assert {await generation(caller, 1) for _ in range(10)} == {1}, "one that always fails fails no caller"
    await until(lambda: counted(Copies(failed=10)), 20, "ten copies that failed")
    await kit.restart_jobs()
    over = await kit.bus.call(Jobs.shadow, ShadowRequest("news"), patience_s=20.0)
    assert (over.to, over.percent, over.copies.failed) == ("worse", 0, 10)


async def test_a_shadow_that_can_not_be(kit: Kit) -> None:
    for request, code, says in ((ShadowRequest("news", "next", 10), "unknown_model", "no deployment 'news'"),
                                (ShadowRequest("news"), "not_found", "no shadow"),
                                (ShadowRequest("news", "news", 10), "invalid", "itself"),
                                (ShadowRequest("news", "next", 101), "invalid", "101")):  # fmt: skip
        with pytest.raises(ClientFault, match=says) as caught:
            await kit.bus.call(Jobs.shadow, request)
        assert caught.value.code == code
    with pytest.raises(ClientFault, match="makes no copies"):
        await kit.bus.call(Jobs.compared, Compared("news", "next", 1.0, Copies(same=1000)))


async def test_a_shadow_is_set_shown_and_promoted_by_command(kit: Kit, caller: httpx.AsyncClient) -> None:
    home, me = kit.system.home, psutil.Process()
    write_up(home, UpFile(me.pid, me.create_time(), kit.system.broker.url, "", "", 0.0))

    async def model(*arguments: str) -> tuple[int, str]:
        command = [sys.executable, "-m", "kernelm_cli", "model", *arguments, "--home", str(home)]
        done = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, timeout=60, check=False)
        return done.returncode, done.stdout + done.stderr

    for name, artifact in (("news", "m1"), ("next", "dull")):
        await kit.end((await kit.submit(kit.deploy(artifact, name=name), name=name)).id)
    assert await model("shadow", "news", "next", "150%") == (2, ANY)
    assert (await model("promote", "news"))[0] == 2, "nothing to promote"
    code, text = await model("shadow", "news", "next")
    assert (code, "next answers 100% of the calls of news" in text) == (0, True), text

    async def copied() -> bool:
        await generation(caller, 1)
        return "0 of " in (shown := (await model("shadow", "news"))[1]) and "0 of 0" not in shown

    await until(copied, 30, "copies, none of which agrees")
    code, text = await model("promote", "news")
    assert (code, "generation 2; its shadow is over" in text) == (0, True), text
    answer = await caller.post("/v1/classify", json={"model": "news", "input": "text", "at_least": 2})
    assert answer.json()["results"][0][0]["label"] == "dull"
    assert "next answered for news; it is over" in (await model("shadow", "news", "--end"))[1]
    code, text = await model("undeploy", "next")
    assert (code, "nobody answers as next any more" in text) == (0, True), text
    assert (await model("undeploy", "next"))[0] == 2, "there is none any more"
