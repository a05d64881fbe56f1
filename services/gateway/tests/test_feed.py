"""Events and jobs over HTTP: who sees what, who may submit, and when a key stops being good."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from kernelm_contracts.jobs import JobChanged, JobProgress, ModelDeployed, RunFinished
from kernelm_gateway import feed
from kernelm_gateway.service import GatewayService, bind
from kernelm_gateway.settings import GatewaySettings
from kernelm_sdk.events import Event, Received
from kernelm_sdk.system import Progress
from kernelm_sdk.system.kernel import InstanceChanged, KeyChanged


@pytest.fixture
async def gateway(bus: Any, tmp_path: Path) -> AsyncIterator[GatewayService]:
    service = GatewayService(bus, tmp_path, GatewaySettings(http_port=0, grpc_port=0), bind("127.0.0.1", 0, "X"))
    await service.on_start()
    yield service
    await service.on_stop()


class Listener:
    """A client that follows events."""

    def __init__(self, lines: AsyncIterator[str]) -> None:
        self._lines = lines

    async def next(self) -> dict[str, Any]:
        async with asyncio.timeout(60):
            async for line in self._lines:
                if line.startswith("data: "):
                    found: dict[str, Any] = json.loads(line.removeprefix("data: "))
                    return found
        raise AssertionError("the stream has ended")


async def listen(client: httpx.AsyncClient, auth: str, query: str = "") -> tuple[Listener, httpx.Response]:
    request = client.build_request("GET", f"/v1/events{query}", headers={"Authorization": auth})
    response = await client.send(request, stream=True)
    assert response.status_code == 200, await response.aread()
    assert response.headers["content-type"].startswith("text/event-stream")
    return Listener(response.aiter_lines()), response


async def happens(bus: Any, *events: Event) -> None:
    for number, event in enumerate(events):
        received = Received(event.TYPE, "jobs", f"id-{number}", "2026-01-01T00:00:00Z", msgspec.json.encode(event), event)
        await bus.handlers["evt.>"](received)


def changed(job: str, tenant: str) -> JobChanged:
    return JobChanged(job=job, name="train", run="r", state="running", epoch=1, tenant=tenant)


NEWS = ModelDeployed(model="news", generation=3, artifact="sha256:0", pool="p")
KEY = KeyChanged(id="k", name="n", change="created", by="admin")
INSTANCE = InstanceChanged(instance="e-0", plugin="encoder", pool="p", state="ready", was="starting")


async def test_a_key_sees_its_tenant_and_its_models(gateway: GatewayService, bus: Any, auth: Any, new_key: Any) -> None:
    bus.keys.records["k2"] = new_key("k2", models=("spam",), tenant="other")
    bus.keys.records["k3"] = new_key("k3", admin=True)
    async with httpx.AsyncClient(base_url=gateway.announcement.http) as client:
        mine, _ = await listen(client, auth())
        theirs, _ = await listen(client, auth("k2"))
        all_of_it, _ = await listen(client, auth("k3"))
        progress = JobProgress(job="j1", name="train", run="r", progress=Progress())
        await happens(bus, INSTANCE, KEY, changed("j9", "other"), NEWS, progress,
                      RunFinished(run="mine-1", name="n", state="done", took_s=1.0), changed("j1", "acme"))  # fmt: skip
        seen = [await mine.next() for _ in range(4)]
        assert [e["type"] for e in seen] == ["model.deployed", "job.progress", "run.finished", "job.state"]
        assert (seen[0]["data"]["model"], seen[0]["source"], seen[0]["specversion"]) == ("news", "jobs", "1.0")
        assert (await theirs.next())["data"]["job"] == "j9"
        assert len([await all_of_it.next() for _ in range(7)]) == 7


async def test_only_the_types_that_are_asked_for(gateway: GatewayService, bus: Any, auth: Any) -> None:
    async with httpx.AsyncClient(base_url=gateway.announcement.http) as client:
        listener, _ = await listen(client, auth(), "?type=job.state&type=run.finished")
        await happens(bus, NEWS, changed("j1", "acme"))
        assert (await listener.next())["type"] == "job.state"


async def test_a_revoked_key_hears_no_more(gateway: GatewayService, bus: Any, auth: Any, new_key: Any,
                                           monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setattr(feed, "QUIET_S", 0.1)
    async with httpx.AsyncClient(base_url=gateway.announcement.http) as client:
        listener, _ = await listen(client, auth())
        bus.keys.records["k1"] = new_key(revoked=True)
        assert (await listener.next())["error"]["code"] == "unauthorized"
        with pytest.raises(AssertionError, match="ended"):
            await listener.next()


async def test_who_reads_too_slowly_is_told(gateway: GatewayService, bus: Any, auth: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed, "BACKLOG", 3)
    async with httpx.AsyncClient(base_url=gateway.announcement.http) as client:
        listener, _ = await listen(client, auth())
        await happens(bus, *[changed("j1", "acme")] * 10)
        kinds = [await listener.next() for _ in range(4)]
        assert kinds[3]["error"]["code"] == "too_slow"


async def test_who_may_not(gateway: GatewayService, bus: Any, auth: Any, new_key: Any) -> None:
    bus.keys.records["k2"] = new_key("k2", methods=("classify",))
    async with httpx.AsyncClient(base_url=gateway.announcement.http) as client:
        assert (await client.get("/v1/events")).status_code == 401
        assert (await client.get("/v1/events", headers={"Authorization": auth("k2")})).status_code == 403
        assert (await client.post("/v1/events", headers={"Authorization": auth()})).status_code == 405


async def test_jobs_and_runs_are_submitted_for_ones_own_tenant(gateway: GatewayService, bus: Any, auth: Callable[..., str],
                                                               new_key: Any) -> None:  # fmt: skip
    job = {"name": "train", "uses": "trainer/1.train", "request": {}, "tenant": "other"}
    run = {"name": "news", "stage": [], "tenant": "other"}
    async with httpx.AsyncClient(base_url=gateway.announcement.http, headers={"Authorization": auth()}) as client:
        refused = await client.post("/v1/jobs", json=job)
        assert (refused.status_code, refused.json()["error"]["code"]) == (403, "permission_denied"), '"*" is not enough'
        bus.keys.records["k2"] = new_key("k2", methods=("submit", "submit-run", "cancel", "cancel-run", "get"))
        client.headers["Authorization"] = auth("k2")
        assert (await client.post("/v1/jobs", json=job)).json()["spec"]["tenant"] == "acme"
        assert (await client.post("/v1/runs", json=run)).json()["spec"]["tenant"] == "acme"
        assert (await client.post("/v1/jobs", json=job | {"parent": "j2"})).status_code == 400
        assert (await client.post("/v1/jobs", json=job | {"wibble": 1})).status_code == 200
        assert (await client.get("/v1/jobs/j1")).json()["id"] == "j1"
        assert (await client.get("/v1/jobs/j2")).status_code == 404
        assert (await client.post("/v1/jobs/j1/cancel")).status_code == 200
        assert (await client.post("/v1/runs/mine-1/cancel")).status_code == 200
        before = len([c for c in bus.calls if "cancel" in c[0]])
        assert (await client.post("/v1/jobs/j2/cancel")).status_code == 404
        assert (await client.post("/v1/runs/theirs-1/cancel")).status_code == 404
        assert len([c for c in bus.calls if "cancel" in c[0]]) == before
