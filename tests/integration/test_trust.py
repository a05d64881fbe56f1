"""Tests that try to get in: what a grant does not list, the broker refuses, and the caller is told at once."""

import asyncio
import base64
import time
from collections.abc import AsyncIterator

import msgspec
import nkeys
import pytest

from kernelm.journal import Entry, audit
from kernelm.testing.harness import System, until
from kernelm_authority.clock import Clock
from kernelm_authority.identity import Grant, read, sign
from kernelm_sdk.bus import Bus, Credentials
from kernelm_sdk.enrollment import join, new_seed, public_key
from kernelm_sdk.errors import ClientFault, Fault, KernelFault
from kernelm_sdk.system import (
    Destination,
    Empty,
    EnrollRequest,
    ExitReport,
    Hello,
    Kernel,
    KeyName,
    KeyRequest,
    Ready,
    RenewRequest,
    Resources,
    RotateKey,
    Route,
)

PLUGIN = Grant("plugin", "mallory", "mallory-pool", "mallory")


@pytest.fixture
async def system() -> AsyncIterator[System]:
    async with System() as system:
        yield system


NOT_GRANTED = [
    "svc.kernel.v1.start-pool.mallory", "svc.kernel.v1.create-key.mallory",  # methods that its manifest does not list
    "svc.kernel.v1.exited.mallory", "svc.kernel.v1.set-route.mallory", "svc.jobs.v1.submit.mallory",
    "impl.kernel.kernel.v1.set-route.mallory", "inst.kernel.kernel.v1.state.mallory", "impl.data.data.v1.describe.mallory",
    "model.news.classify.mallory", "impl.news-g1.model.news.classify.mallory",  # a model
    "svc.kernel.v1.hello.admin", "svc.kernel.v1.renew.jobs", "svc.work.v1.report.data-1",  # in another's name
    "inst.data-1.plugin.v1.stop.mallory", "inst.data-1.data.v1.prepare.jobs",  # at another instance
    "evt.plugin.state.kernel", "evt.job.state.jobs", "evt.key.changed.mallory.x",  # an event from another source
    "evt.plugin.state.mallory", "evt.swap.phase.mallory", "evt.model.deployed.mallory",  # the system's word, in its own name
    "evt.weather.changed.mallory",  # an event that its manifest does not list
    "$KV.leases.kernel", "$KV.leases.data-1", "$KV.registry.instance.x", "$KV.keys.a", "$KV.routes.leader", "$KV.jobs.job.a",
    "$JS.API.DIRECT.GET.KV_keys.$KV.keys.a", "$JS.API.DIRECT.GET.KV_registry", "$JS.API.DIRECT.GET.EVT",
    "$JS.API.STREAM.DELETE.EVT", "$JS.API.STREAM.PURGE.KV_keys", "$JS.API.STREAM.UPDATE.EVT", "$JS.API.STREAM.CREATE.X",
    "$JS.API.CONSUMER.CREATE.EVT", "$JS.API.STREAM.MSG.GET.KV_keys", "$JS.API.STREAM.NAMES", "$JS.API.INFO",
    "$SYS.REQ.CLAIMS.UPDATE", "$SYS.REQ.ACCOUNT.X.CLAIMS.LOOKUP", "audit.kernel", "dlq.mallory.x", "tel.x", "x",
]  # fmt: skip


async def denied(bus: Bus, subject: str) -> None:
    """The caller is told, with the right code, and long before its call would time out."""
    async with asyncio.timeout(60.0):
        with pytest.raises(ClientFault, match="may not publish") as fault:
            await bus.request(subject, b"{}", 300.0)
    assert (fault.value.code, fault.value.http_status) == ("permission_denied", 403), subject


async def test_a_plugin_publishes_nothing_that_was_not_granted(system: System) -> None:
    mallory = await system.connect("mallory", PLUGIN)
    for subject in NOT_GRANTED:
        await denied(mallory, subject)
    assert (await system.state()).health["routes"] == "in force"


async def test_a_plugin_listens_to_nothing_that_is_not_its_own(system: System) -> None:
    mallory = await system.connect("mallory", PLUGIN)
    for subject in (">", "*.>", "evt.>", "impl.kernel.>", "impl.*.>", "inst.kernel.>", "_INBOX.>", "_INBOX.admin.>", "svc.>",
                    "$SYS.>", "$KV.>", "$KV.keys.>", "$JS.>", "audit.>", "impl.mallory-pool2.>", "model.>"):  # fmt: skip
        for queue in ("", "kernel"):  # not even in somebody's queue group, where it would answer in their place
            with pytest.raises(ClientFault, match="may not") as fault:
                await mallory.subscribe(subject, lambda *_: asyncio.sleep(0), queue)
            assert fault.value.code == "permission_denied"
    await mallory.subscribe("impl.mallory-pool.>", lambda *_: asyncio.sleep(0))  # its own: the others are refused for a cause


async def test_services_have_what_they_need_and_no_more(system: System) -> None:
    node, artifacts, gateway, jobs = [await system.connect(n) for n in ("node-local", "artifacts", "gateway", "jobs")]
    for bus, subjects in (
        (node, ("svc.kernel.v1.set-route.{}", "svc.jobs.v1.submit.{}", "inst.data-1.plugin.v1.stop.{}", "$KV.jobs.a",
                "$JS.API.DIRECT.GET.KV_keys", "model.news.classify.{}")),
        (artifacts, ("svc.kernel.v1.load.{}", "$KV.jobs.a", "$JS.API.DIRECT.GET.KV_keys", "svc.jobs.v1.submit.{}")),
        (gateway, ("svc.kernel.v1.create-key.{}", "inst.kernel.kernel.v1.rotate-key.{}", "impl.kernel.kernel.v1.revoke-key.{}",
                   "$KV.keys.a", "$KV.jobs.a", "svc.kernel.v1.state.admin")),
        (jobs, ("svc.kernel.v1.create-key.{}", "$KV.registry.member.jobs", "$KV.routes.leader", "$JS.API.DIRECT.GET.KV_keys",
                "$JS.API.STREAM.DELETE.KV_jobs", "evt.plugin.state.kernel")),
    ):  # fmt: skip
        for subject in subjects:
            await denied(bus, subject.format(bus.user))
    assert await gateway.call(Kernel.state, Empty())
    with pytest.raises(ClientFault, match="does not run"):  # what only the node of an instance may say
        await node.call(Kernel.exited, ExitReport("kernel", 1))


async def test_a_client_has_its_models_and_its_methods(system: System) -> None:
    client = await system.connect("acme", Grant("client", "acme", models=("news",), methods=("classify",)))
    for subject in ("model.news.embed.acme", "model.spam.classify.acme", "model.news.classify.other", "svc.kernel.v1.state.acme",
                    "impl.p.model.spam.classify.acme", "evt.a.b.acme", "$KV.leases.acme", "svc.kernel.v1.renew.acme"):  # fmt: skip
        await denied(client, subject)
    with pytest.raises(KernelFault, match="nobody answers"):  # granted; there is nobody yet
        await client.request("model.news.classify.acme", b"{}", 5.0)


async def test_replies_can_neither_be_read_nor_forged(system: System) -> None:
    """Who is called learns the caller's inbox. It must not be able to answer what was asked of others."""
    mallory, victim = await system.connect("mallory", PLUGIN), await system.connect("gateway")
    inboxes: list[str] = []

    async def note(subject: str, body: bytes, reply: str) -> bytes:
        inboxes.append(reply)
        return b"{}"

    await mallory.subscribe("inst.mallory.>", note)
    for _ in range(3):
        await victim.request("inst.mallory.x.v1.y.gateway", b"{}", 5.0)
    prefix, tokens = inboxes[0].rpartition(".")[0], [i.rpartition(".")[2] for i in inboxes]
    assert len({t[-16:] for t in tokens}) == 3
    with pytest.raises(ClientFault, match="may not"):
        await mallory.subscribe(f"{prefix}.*", lambda *_: asyncio.sleep(0))
    assert victim.boot not in prefix  # the events of a member tell its boot
    ours: list[bytes] = []

    async def slow(subject: str, body: bytes, reply: str) -> bytes:
        for guess in range(1, 50):  # the numbers of requests can be guessed, their names can't
            await mallory._client.publish(f"{prefix}.{guess:x}{tokens[0][-16:]}", b"forged")
            await mallory._client.publish(f"{prefix}.{guess:x}", b"forged")
        await mallory._link.barrier()
        ours.append(body)
        return b"true"

    honest = await system.connect("honest", Grant("plugin", "honest", "honest", "honest"))
    await honest.subscribe("inst.honest.>", slow)
    assert (await victim.request("inst.honest.x.v1.y.gateway", b"{}", 10.0)).data == b"true"
    assert ours == [b"{}"]


def decoded(token: str) -> Credentials:
    return msgspec.json.decode(base64.urlsafe_b64decode(token + "==="), type=Credentials)


async def test_a_join_token_works_once_and_for_one_key(system: System) -> None:
    token = system.authority.token("jobs")
    credentials = await join(system.broker.url, token)
    assert credentials.user == "jobs"
    with pytest.raises(ClientFault, match="used already"):
        await join(system.broker.url, token)  # with another key: each join makes one
    ticket = await system.track(Bus.connect(system.broker.url, decoded(token)))
    await denied(ticket, f"svc.kernel.v1.state.{ticket.user}")
    with pytest.raises(ClientFault, match="belongs to another"):
        await ticket.call(Kernel.enroll, EnrollRequest(decoded(system.authority.token("gateway")).jwt, public_key(new_seed())))
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
    with pytest.raises(ClientFault, match="can't be ready for"):
        await mallory.call(Kernel.ready, Ready("kernel"))
    victim = await system.connect("jobs")
    with pytest.raises(ClientFault, match="somebody else's"):  # or giving it back would revoke it
        await mallory.call(Kernel.renew, RenewRequest(public_key(victim.credentials.seed)))


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
        await Bus.connect(system.broker.url, credentials, timeout_s=3)
    await system.admin.call(Kernel.set_route, Route("news", "model", (Destination("p", 100),), 1))  # another push revives nothing
    with pytest.raises(Fault):
        await Bus.connect(system.broker.url, credentials, timeout_s=3)
    with pytest.raises(ClientFault, match="no key"):
        await system.admin.call(Kernel.revoke_key, KeyName("nothing"))


class AnHourAhead(Clock):
    def __call__(self) -> float:
        return super().__call__() + 3600


@pytest.mark.parametrize("lifetime_s", [0, 1800])
@pytest.mark.parametrize("ahead", ["when it signed", "when it revoked", "when it looked whether that may be forgotten"])
async def test_a_revocation_holds_whatever_the_clock_said(
    system: System, ahead: str, lifetime_s: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The broker compares the moments at which a JWT was signed and its key revoked: the kernel follows the broker's clock, and one
    that is put right lies between."""
    assert system.kernel is not None

    seed, request = new_seed(), KeyRequest("acme", ("news",), expires_s=lifetime_s)
    with monkeypatch.context() as patch:
        if ahead == "when it signed":
            patch.setattr(system.kernel.authority, "clock", AnHourAhead())
        made = await system.admin.call(Kernel.create_key, msgspec.structs.replace(request, public_key=public_key(seed)))
    credentials = Credentials(f"key-{made.key.id}", made.jwt, seed)
    client = await system.track(Bus.connect(system.broker.url, credentials))
    with monkeypatch.context() as patch:
        if ahead == "when it revoked":
            patch.setattr(system.kernel.authority, "clock", AnHourAhead())
        await system.admin.call(Kernel.revoke_key, KeyName(made.key.id))
    await until(lambda: not client.connected, 15, "the client cut off")
    with monkeypatch.context() as patch:
        if ahead.startswith("when it looked"):
            patch.setattr(system.kernel.authority, "clock", AnHourAhead())
        await system.admin.call(Kernel.set_route, Route("news", "model", (Destination("p", 100),), 1))  # pushes the claims again
    with pytest.raises(Fault):
        await Bus.connect(system.broker.url, credentials, timeout_s=3)


async def test_a_revocation_survives_the_kernel_and_the_broker(system: System) -> None:
    seed = new_seed()
    made = await system.admin.call(Kernel.create_key, KeyRequest("acme", ("news",), public_key=public_key(seed)))
    credentials = Credentials(f"key-{made.key.id}", made.jwt, seed)
    mallory = await system.connect("mallory", PLUGIN)
    assert system.kernel is not None
    await system.kernel.members.shut_out("mallory")
    await system.admin.call(Kernel.revoke_key, KeyName(made.key.id))
    await until(lambda: not mallory.connected, 20, "the member cut off at once")

    async def refused() -> None:
        for held in (credentials, mallory.credentials):
            with pytest.raises(Fault, match=r"refused|uthorization|no broker"):
                await Bus.connect(system.broker.url, held, timeout_s=3)

    await refused()
    await system.kernel.stop()
    await refused()
    await system.start_kernel()
    await refused()
    system.processes["broker"].terminate()
    await asyncio.to_thread(system.processes["broker"].wait)
    system.start_broker()
    await until(lambda: system.admin.connected, 20, "the broker back")
    await refused()


async def test_who_is_refused_is_told_so_in_time(system: System) -> None:
    """nats-py's connect swallows a cancellation now and then, and would go on for ever: with many at once it does."""
    seed = new_seed()
    made = await system.admin.call(Kernel.create_key, KeyRequest("acme", ("news",), public_key=public_key(seed)))
    await system.admin.call(Kernel.revoke_key, KeyName(made.key.id))
    credentials = Credentials(f"key-{made.key.id}", made.jwt, seed)
    trying = [asyncio.create_task(Bus.connect(system.broker.url, credentials, timeout_s=3)) for _ in range(20)]
    _, left = await asyncio.wait(trying, timeout=120)
    assert not left
    assert {getattr(t.exception(), "code", None) for t in trying} == {"unauthorized"}


async def test_a_rotated_key_of_a_client_opens_until_its_overlap_ends(system: System) -> None:
    old, new = new_seed(), new_seed()
    made = await system.admin.call(Kernel.create_key, KeyRequest("acme", ("news",), public_key=public_key(old), admin=True))
    client = await system.track(Bus.connect(system.broker.url, Credentials(f"key-{made.key.id}", made.jwt, old)))
    rotated = await system.admin.call(Kernel.rotate_key, RotateKey(made.key.id, 2, public_key(new)))
    assert rotated.secret != made.secret
    assert (rotated.key.previous_hash, rotated.key.admin, rotated.key.models) == (made.key.hash, True, ("news",))
    later = await system.track(Bus.connect(system.broker.url, Credentials(f"key-{made.key.id}", rotated.jwt, new)))
    assert client.connected
    await until(lambda: not client.connected, 15, "the old one cut off")
    assert later.connected
    listed = (await system.admin.call(Kernel.list_keys, Empty())).keys[0]
    assert listed == rotated.key
    at_once = await system.admin.call(Kernel.rotate_key, RotateKey(made.key.id))
    assert at_once.key.previous_hash == ""
    last = await system.admin.call(Kernel.rotate_key, RotateKey(made.key.id, 600, public_key(seed := new_seed())))
    third = await system.track(Bus.connect(system.broker.url, Credentials(f"key-{made.key.id}", last.jwt, seed)))
    await system.admin.call(Kernel.revoke_key, KeyName(made.key.id))
    await until(lambda: not later.connected and not third.connected, 5, "all cut off at once, in an overlap or not")
    with pytest.raises(ClientFault, match="was revoked"):
        await system.admin.call(Kernel.rotate_key, RotateKey(made.key.id))


async def test_a_thawed_old_kernel_can_neither_push_nor_answer_and_ends(system: System) -> None:
    assert system.kernel is not None
    old = system.kernel
    await system.start_kernel()
    await until(lambda: old.bus.closed, 5, "the old kernel shut out")
    for generation in range(1, 6):  # none of these goes to the old one
        await system.admin.call(Kernel.set_route, Route("news", "model", (Destination("new", 100),), generation))
    with pytest.raises(KernelFault):
        await old.router.set_all([Route("news", "model", (Destination("old", 100),), 9)])
    await until(old.deposed.is_set, 10, "the old kernel giving up by itself")
    await system.kernel.router.check()
    assert (await system.state()).leader_epoch == 2
    await old.stop()


async def test_a_kernel_that_was_not_shut_out_may_not_push_either(system: System) -> None:
    assert system.kernel is not None
    router = system.kernel.router
    leader, revision = await router._leader.get("leader")
    assert leader is not None
    await router._leader.put("leader", msgspec.structs.replace(leader, epoch=2, boot="another"), revision)
    with pytest.raises(Fault, match="deposed"):
        await router.set_all([Route("news", "model", (Destination("old", 100),), 1)])
    with pytest.raises(Fault, match="deposed"):
        await router.revoke("U" + "A" * 55, 0)
    assert "deposed by epoch 2" in router.health
    await until(system.kernel.deposed.is_set, 10, "the deposed kernel giving up by itself")


@pytest.mark.parametrize("how", ["older", "foreign", "without revocations"])
async def test_claims_that_are_not_in_force_are_noticed_and_put_right(system: System, how: str) -> None:
    assert system.kernel is not None
    router, victim = system.kernel.router, new_seed()
    await system.admin.call(Kernel.set_route, Route("news", "model", (Destination("p", 100),), 1))
    await router.revoke(public_key(victim), int(time.time()) + 3600)
    told: list[str] = []
    check = router.check

    async def noted() -> None:
        try:
            await check()
        finally:
            told.append(router.health)

    router.check = noted  # type: ignore[method-assign]
    foreign = await Bus.connect(system.broker.url, system.authority.credentials("intruder", "system"))
    if how == "foreign":  # signed by a key that is not the operator's: acknowledged, and nothing changes
        nats = {"type": "account", "version": 2}
        claims = sign({"sub": system.authority.account, "nats": nats}, new_seed(nkeys.PREFIX_BYTE_OPERATOR))
    else:
        mappings = router.mappings() if how == "without revocations" else {}
        claims = system.authority.account_jwt(mappings=mappings, iat=1)
    await foreign.request("$SYS.REQ.CLAIMS.UPDATE", claims.encode(), 5)
    await foreign.close()
    if how != "foreign":
        await until(lambda: "the broker holds another table" in told, 10, "health said so")
    told.clear()
    await until(lambda: told[-1:] == ["in force"], 10, "the table pushed again")
    assert (await system.state()).health["routes"] == "in force"
    jwt, _ = system.authority.issue(Grant("client", "gone"), public_key(victim))
    with pytest.raises(Fault):  # what it revoked is revoked
        await Bus.connect(system.broker.url, Credentials("gone", backdated(jwt, system), victim), timeout_s=3)


def backdated(jwt: str, system: System) -> str:
    """The same claims, issued an hour ago."""
    return sign(read(jwt) | {"iat": int(time.time()) - 3600}, system.authority._seeds["account"])


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
