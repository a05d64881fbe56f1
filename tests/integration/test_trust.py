"""Tests that try to get in: what a grant does not list, the broker refuses, and the caller is told at once."""

import asyncio
from collections.abc import AsyncIterator

import msgspec
import pytest

from kernelm.identity import Grant
from kernelm.journal import Entry, audit
from kernelm.testing.harness import System, until
from kernelm_sdk.bus import Bus, Credentials
from kernelm_sdk.enrollment import join, new_seed, public_key
from kernelm_sdk.errors import ClientFault, Fault
from kernelm_sdk.system import (
    Destination,
    Empty,
    Hello,
    Kernel,
    KeyName,
    KeyRequest,
    RenewRequest,
    Resources,
    Route,
)

PLUGIN = Grant("plugin", "mallory", "mallory-pool", "mallory")


@pytest.fixture
async def system() -> AsyncIterator[System]:
    async with System() as system:
        yield system


@pytest.mark.parametrize("subject", [
    "svc.kernel.v1.start-pool.mallory",  # a method that its manifest does not list
    "svc.kernel.v1.hello.admin",  # in another's name
    "evt.plugin.state.kernel",  # an event from another source
    "$KV.leases.kernel", "$KV.registry.instance.x", "$JS.API.STREAM.DELETE.EVT",
    "impl.kernel.kernel.v1.set-route.mallory", "inst.kernel.kernel.v1.state.mallory",
])  # fmt: skip
async def test_a_plugin_publishes_nothing_that_was_not_granted(system: System, subject: str) -> None:
    mallory = await system.connect("mallory", PLUGIN)
    with pytest.raises(ClientFault, match="may not publish") as denied:
        await mallory.request(subject, b"{}", 3.0)
    assert denied.value.code == "permission_denied"


@pytest.mark.parametrize(
    "subject", [">", "evt.>", "impl.kernel.>", "inst.kernel.>", "_INBOX.>", "_INBOX.admin.>", "svc.>", "$SYS.>"]
)
async def test_a_plugin_listens_to_nothing_that_is_not_its_own(system: System, subject: str) -> None:
    mallory = await system.connect("mallory", PLUGIN)
    with pytest.raises(ClientFault, match="may not"):
        await mallory.subscribe(subject, lambda *_: asyncio.sleep(0))


async def test_a_join_token_works_once_and_for_one_key(system: System) -> None:
    token = system.authority.token("jobs")
    credentials = await join(system.broker.url, token)
    assert credentials.user == "jobs"
    with pytest.raises(ClientFault, match="used already"):
        await join(system.broker.url, token)
    with pytest.raises(ClientFault, match="damaged"):
        await join(system.broker.url, "!!!")


async def test_a_stranger_with_keys_of_its_own_is_not_let_in(system: System) -> None:
    seed = new_seed()
    own = system.authority.user_jwt("admin", public_key(seed), [">"], [">"], account="system")[0]
    with pytest.raises(Fault, match=r"refused|no broker"):
        await Bus.connect(system.broker.url, Credentials("admin", own[:-8] + "AAAAAAAA", seed), timeout_s=3)


async def test_a_member_can_not_be_another(system: System) -> None:
    mallory = await system.connect("mallory", PLUGIN)
    with pytest.raises(ClientFault, match="can't say hello for"):
        await mallory.call(Kernel.hello, Hello("kernel", "kernel", "1", ()))
    with pytest.raises(ClientFault, match="not the one that was enrolled"):
        await mallory.call(Kernel.renew, RenewRequest(public_key(new_seed())))


async def test_a_revoked_key_is_cut_off_and_can_not_come_back(system: System) -> None:
    seed = new_seed()
    made = await system.admin.call(Kernel.create_key, KeyRequest("acme", ("news",), public_key=public_key(seed)))
    assert made.secret.startswith(f"km_{made.key.id}_")
    assert made.secret.rpartition("_")[2] not in msgspec.json.encode(made.key).decode()
    credentials = Credentials(f"key-{made.key.id}", made.jwt, seed)
    client = await system.track(Bus.connect(system.broker.url, credentials))
    await system.admin.call(Kernel.revoke_key, KeyName(made.key.id))
    await until(lambda: not client.connected, 5, "the live connection cut")
    with pytest.raises(Fault):
        await Bus.connect(system.broker.url, credentials, timeout_s=2)
    await system.admin.call(Kernel.set_route, Route("news", "model", (Destination("p", 100),), 1))  # another push revives nothing
    with pytest.raises(Fault):
        await Bus.connect(system.broker.url, credentials, timeout_s=2)
    with pytest.raises(ClientFault, match="no key"):
        await system.admin.call(Kernel.revoke_key, KeyName("nothing"))


async def test_a_thawed_old_kernel_can_not_push(system: System) -> None:
    assert system.kernel is not None
    old = system.kernel
    await system.start_kernel()
    with pytest.raises(Fault, match="deposed"):
        await old.router.set(Route("news", "model", (Destination("old", 100),), 1))
    assert "deposed" in old.router.health
    await old.stop()


async def test_claims_that_are_not_in_force_are_noticed_and_put_right(system: System) -> None:
    assert system.kernel is not None
    await system.admin.call(Kernel.set_route, Route("news", "model", (Destination("p", 100),), 1))
    foreign = await Bus.connect(system.broker.url, system.authority.credentials("intruder", "system"))
    await foreign.request("$SYS.REQ.CLAIMS.UPDATE", system.authority.account_jwt(mappings={}, iat=1).encode(), 5)
    await foreign.close()
    with pytest.raises(Fault, match="did not apply"):
        await system.kernel.router.check()

    async def in_force() -> bool:
        assert system.kernel is not None
        try:
            await system.kernel.router.check()
        except Fault:
            return False
        return True

    await until(in_force, 5, "the table pushed again")


async def test_weights_and_generations_are_checked(system: System) -> None:
    for route in (Route("m", "model", (Destination("p", 90),)), Route("m", "model", (Destination("p", 101), Destination("q", -1)))):
        with pytest.raises(ClientFault, match="weights"):
            await system.admin.call(Kernel.set_route, route)
    await system.admin.call(Kernel.set_route, Route("m", "model", (Destination("p", 100),), 2))
    with pytest.raises(ClientFault, match="generation 2"):
        await system.admin.call(Kernel.set_route, Route("m", "model", (Destination("q", 100),), 1))


async def test_records_are_compare_and_set(system: System) -> None:
    bucket = (await system.connect("jobs")).bucket("jobs", Resources)
    assert await bucket.get("job.a") == (None, 0)
    first = await bucket.put("job.a", Resources(1), 0)
    with pytest.raises(ClientFault) as late:
        await bucket.put("job.a", Resources(2), 0)
    assert late.value.code == "conflict"
    second = await bucket.put("job.a", Resources(2), first)
    await bucket.put("job.b", Resources(3), 0)
    assert {k: v for k, (v, _) in (await bucket.all("job")).items()} == {"job.a": Resources(2), "job.b": Resources(3)}
    await bucket.delete("job.a", second)
    assert (await bucket.get("job.a"))[0] is None
    assert set(await bucket.all()) == {"job.b"}
    for k in range(1200):  # more than one batch
        await bucket.put(f"many.{k}", Resources(k), 0)
    assert len(await bucket.all("many")) == 1200


async def test_what_was_done_is_chained_and_the_event_log_is_whole(system: System) -> None:
    assert system.kernel is not None
    for generation in (1, 2):
        await system.admin.call(Kernel.set_route, Route("m", "model", (Destination("p", 100),), generation))
    entries = [msgspec.json.decode(body, type=Entry) async for _, _, body, _ in system.kernel.bus.read("AUDIT")]
    assert [e.before for e in entries[1:]] == [e.hash() for e in entries[:-1]]
    assert [(e.who, e.what) for e in entries[-2:]] == [("admin", "set_route")] * 2
    verdict = await audit(system.kernel.bus)
    assert (verdict.text, verdict.events > 2) == ("intact", True)
    assert (await system.state()).leader_epoch == 1
    await system.admin.call(Kernel.state, Empty())


async def test_a_flipped_bit_in_the_event_log_is_found_and_named() -> None:
    async with System() as system:
        assert system.kernel is not None
        for generation in range(1, 4):
            await system.admin.call(Kernel.set_route, Route("m", "model", (Destination("p", 100),), generation))
        system.processes["broker"].terminate()
        await asyncio.to_thread(system.processes["broker"].wait)
        block = next(p for p in system.home.rglob("*.blk") if "EVT" in p.parts)
        data = bytearray(block.read_bytes())
        data[data.index(b'"took_ms"') + 3] ^= 1
        block.write_bytes(data)
        system.start_broker()

        async def verdict() -> str:
            assert system.kernel is not None
            try:
                return (await audit(system.kernel.bus)).text
            except Fault:
                return ""

        text = await until(verdict, 15, "a verdict")
        assert text != "intact"
