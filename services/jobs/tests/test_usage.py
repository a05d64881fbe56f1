"""A tenant's calls and holdings, counted in a real system: once each, whatever is killed, and its budget kept."""

import asyncio
from typing import Any

import msgspec
import pytest

from kernelm.testing.harness import until
from kernelm_contracts.jobs import Jobs, JobSpec, RunSpec
from kernelm_contracts.server import ClassifyRequest, Server
from kernelm_contracts.usage import TenantUsage, UsageQuery, UsageReport
from kernelm_sdk import usage
from kernelm_sdk.bus import Bus, Credentials
from kernelm_sdk.enrollment import new_seed, public_key
from kernelm_sdk.errors import ClientFault, Fault
from kernelm_sdk.system import Kernel, KeyRequest, Resources, Used, UsedRow, Work

Kit = Any  # of conftest.py, which can't be imported
FAST = "usage_every_s = 0.2\n"
BUDGET = '[[budgets]]\ntenant = "acme"\nperiod = "day"\ntokens = 1000\ncpu_s = 0.3\n'


async def account(kit: Kit, tenant: str) -> TenantUsage:
    report: UsageReport = await kit.bus.call(Jobs.usage, UsageQuery(tenant), patience_s=10.0)
    return report.days[-1].usage if report.days else TenantUsage()


async def configured(kit: Kit, text: str) -> None:
    path = kit.system.home / "jobs.toml"
    path.write_text(text.partition("[[")[0] + path.read_text() + "".join(text.partition("[[")[1:]))
    await kit.restart_jobs()


async def client(kit: Kit, tenant: str) -> Bus:
    """A NATS client with a key of `tenant`."""
    seed = new_seed()
    created = await kit.bus.call(Kernel.create_key, KeyRequest("c", ("*",), ("*",), tenant, 0, public_key(seed)))
    bus: Bus = await kit.system.track(Bus.connect(kit.system.broker.url, Credentials(f"key-{created.key.id}", created.jwt, seed)))
    return bus


async def test_calls_and_holdings_are_on_the_tenants_account(kit: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(usage, "EVERY_S", 0.2)
    await configured(kit, FAST)
    await kit.pools("scheduler")
    stage = {"uses": "deploy", "name": "deploy", "resources": {"cpu": 0.5}, "with": {"name": "news", "model": kit.digest("m")}}
    spec = msgspec.convert({"name": "news", "tenant": "initech", "stage": [stage]}, RunSpec)
    run = await kit.bus.call(Jobs.submit_run, spec)
    assert (await kit.end(run.id)).run.state == "done"
    bus = await client(kit, "acme")
    for _ in range(3):
        await bus.call(Server.classify, ClassifyRequest(("text",)), model="news")
    with pytest.raises(Fault):
        await bus.call(Server.classify, ClassifyRequest(("text",), at_least=99), model="news")

    async def counted() -> bool:
        calls = (await account(kit, "acme")).calls.get("news")
        return calls is not None and (calls.calls, calls.failed) == (4, 1)

    await until(counted, 10, "four calls on acme's account")

    async def charged() -> bool:
        serving = (await account(kit, "initech")).held.get("serving")
        return serving is not None and serving.cpu_s > 0.1

    await until(charged, 10, "processor seconds on initech's account")
    before = (await account(kit, "initech")).held["serving"].cpu_s
    await kit.restart_jobs()  # by kill -9
    assert (await account(kit, "initech")).held["serving"].cpu_s >= before
    assert (await account(kit, "acme")).calls["news"].calls == 4


async def test_what_was_not_told_is_told_at_the_end_of_an_instance(kit: Kit) -> None:
    await kit.pools("scheduler")
    run = await kit.submit({"uses": "deploy", "resources": {"cpu": 0.1}, "with": {"name": "news", "model": kit.digest("m")}})
    assert (await kit.end(run.id)).run.state == "done"
    bus = await client(kit, "acme")
    for _ in range(5):
        await bus.call(Server.classify, ClassifyRequest(("text",)), model="news")
    again = await kit.submit({"uses": "deploy", "resources": {"cpu": 0.1}, "with": {"name": "news", "model": kit.digest("n")}})
    assert (await kit.end(again.id)).run.state == "done"  # the old instance is drained and has stopped

    async def counted() -> bool:
        calls = (await account(kit, "acme")).calls.get("news")
        return calls is not None and calls.calls == 5

    await until(counted, usage.EVERY_S * 2, "five calls on acme's account")


async def test_nobody_charges_another_tenant(kit: Kit) -> None:
    rows = (UsedRow("news", tenant="acme", calls=7), UsedRow("news", "key-nobody", calls=2), UsedRow("news", "gateway", calls=3))
    told = Used("life", 1, rows)
    await kit.bus.call(Work.used, told)  # by the administrator, who is no gateway
    await kit.bus.call(Work.used, told)
    assert (await account(kit, "acme")).calls == {}
    assert (await account(kit, "system")).calls["news"].calls == 9


async def test_who_has_spent_its_budget_starts_nothing_new(kit: Kit) -> None:
    await configured(kit, FAST + BUDGET)
    await kit.pools("scheduler", "trainer")
    going = asyncio.Event()

    async def act(request: Any, job: Any) -> Any:
        await going.wait()
        return kit.trained()

    kit.acts["long"] = act
    job = await kit.bus.call(Jobs.submit, JobSpec("long", "trainer/1.train", {"dataset": "d"}, Resources(0.5), tenant="acme"))

    async def spent() -> bool:
        report: UsageReport = await kit.bus.call(Jobs.usage, UsageQuery("acme"))
        return report.budgets[0].spent == ("cpu_s",)

    await until(spent, 20, "the budget to be spent")
    with pytest.raises(ClientFault, match="cpu_s") as caught:
        await kit.bus.call(Jobs.submit, JobSpec("next", "trainer/1.train", {"dataset": "e"}, Resources(0.5), tenant="acme"))
    assert caught.value.code == "budget_spent"
    going.set()
    assert (await kit.job(job.id, lambda j: j.state == "done")).state == "done"  # what is under way is brought to its end
    other = await kit.bus.call(Jobs.submit, JobSpec("other", "trainer/1.train", {"dataset": "f"}, Resources(0.5), tenant="initech"))
    assert (await kit.job(other.id, lambda j: j.state == "done")).state == "done"
