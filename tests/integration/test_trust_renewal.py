"""JWTs and keys that are renewed under load: nothing is lost, nothing is handled twice, and the old key is worth nothing."""

import asyncio
import contextlib
import itertools
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any, ClassVar

import msgspec
import pytest

from kernelm.testing.harness import System, until
from kernelm_sdk.bus import Bus, Credentials
from kernelm_sdk.contract import Contract, streamed, unary
from kernelm_sdk.enrollment import new_seed, public_key, renew
from kernelm_sdk.errors import Fault
from kernelm_sdk.events import Event, Received
from kernelm_sdk.plugin import Call, Manifest, Plugin
from kernelm_sdk.system import Empty, Kernel, RenewRequest


class Number(msgspec.Struct, frozen=True):
    n: int


class Ticked(Event, frozen=True):
    TYPE: ClassVar[str] = "renewal.ticked"
    n: int


class Clockwork(Contract, name="clockwork", major=1):
    @unary
    async def tick(self, request: Number, call: Any) -> Number: ...
    @streamed
    async def count(self, request: Number, call: Any) -> AsyncIterator[Number]: ...


class ClockworkPlugin(Plugin, Clockwork):
    handled: ClassVar[Counter[tuple[str, int]]] = Counter()

    async def tick(self, request: Number, call: Call) -> Number:
        ClockworkPlugin.handled[call.caller, request.n] += 1
        await asyncio.sleep(0.001 * (request.n % 20))  # some answers come after the connection was replaced
        return request

    async def count(self, request: Number, call: Call) -> AsyncIterator[Number]:
        for k in range(request.n):
            if k % 50 == 0:
                await asyncio.sleep(0.01)
            yield Number(k)


MANIFEST = Manifest("clockwork", "1", "ticks", ("clockwork/1",), f"{__name__}:ClockworkPlugin",
                    events=("renewal.ticked",))


@pytest.fixture
async def system() -> AsyncIterator[System]:
    ClockworkPlugin.handled.clear()
    async with System() as system:
        yield system


async def load(bus: Bus, over: asyncio.Event, period_s: float = 0.004, instance: str = "", first: int = 0) -> int:
    """Open load: a call every `period_s`, whether the ones before were answered or not; how many. Raises the first fault."""
    calls: list[asyncio.Task[Any]] = []
    begun = time.monotonic()
    while not over.is_set():
        number = first + len(calls)
        calls.append(asyncio.create_task(bus.call(Clockwork.tick, Number(number), instance=instance, timeout_s=60.0)))
        await asyncio.sleep(max(begun + len(calls) * period_s - time.monotonic(), 0))
    answers = await asyncio.gather(*calls)
    assert [a.n for a in answers] == list(range(first, first + len(calls)))
    return len(calls)


async def test_hundreds_of_renewals_under_load_lose_and_double_nothing(system: System) -> None:
    member = await system.plugin(ClockworkPlugin, MANIFEST)
    member.own_process = False
    caller = await system.connect("gateway")
    seen: list[int] = []

    async def note(event: Received) -> None:
        seen.append(event.event.n)  # type: ignore[union-attr]

    await caller.follow(note, "evt.renewal.ticked.*")
    over = asyncio.Event()
    published = 0

    async def publish() -> None:
        nonlocal published
        while not over.is_set():
            published += 1
            await member.bus.publish(Ticked(n=published))

    async def stream() -> int:
        whole = 0
        while not over.is_set():
            assert [f.n async for f in caller.stream(Clockwork.count, Number(2000))] == list(range(2000))
            whole += 1
        return whole

    work = [asyncio.create_task(w) for w in (
        load(caller, over), load(caller, over, 0.01, member.name, 10**6), publish(), stream(), stream())]  # fmt: skip
    keys = {caller.credentials.seed, member.bus.credentials.seed}
    for _ in range(150):
        await asyncio.gather(*(renew(bus, new_seed(), overlap_s=30) for bus in (caller, member.bus)))
        keys |= {caller.credentials.seed, member.bus.credentials.seed}
    over.set()
    pool, direct, _, *streams = await asyncio.gather(*work)
    assert len(keys) == 302
    assert len(ClockworkPlugin.handled) == pool + direct
    assert set(ClockworkPlugin.handled.values()) == {1}
    assert all(streams)
    await until(lambda: len(seen) >= published, 10, "the last event")
    assert seen == list(range(1, published + 1))
    await until(lambda: not caller._retiring and not member.bus._retiring, 35, "the old connections closed")


async def test_a_member_lives_on_for_many_lifetimes_of_its_jwt(system: System, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kernelm.keys.LIFETIME_S", 9)
    member = await system.plugin(ClockworkPlugin, MANIFEST)
    member.own_process = False  # should it be shut out, the test ends and not the process
    expires, over = {member.bus.credentials.expires}, asyncio.Event()
    calls = asyncio.create_task(load(system.admin, over, 0.02))

    def often() -> bool:
        expires.add(member.bus.credentials.expires)
        return len(expires) > 3 or member.orphaned

    await until(often, 120, "three renewals")
    assert not member.orphaned
    over.set()
    assert set(ClockworkPlugin.handled.values()) == {1}
    assert await calls == len(ClockworkPlugin.handled)
    assert (await system.state()).health["routes"] == "in force"


async def test_a_lease_does_not_wait_for_a_kernel_that_hangs_while_the_key_is_due(monkeypatch: pytest.MonkeyPatch) -> None:
    due = time.time() + 5
    monkeypatch.setattr("kernelm_sdk.runner._renewal", lambda _: due)
    async with System(kernel="process") as system:
        member = await system.plugin(ClockworkPlugin, MANIFEST)
        member.own_process = False
        said, append = list[float](), member.bus.append

        async def noted(subject: str, *rest: Any, **more: Any) -> int:
            said.append(time.monotonic())
            return await append(subject, *rest, **more)

        monkeypatch.setattr(member.bus, "append", noted)
        system.processes["kernelm"].send_signal(signal.SIGSTOP)
        try:
            await until(lambda: time.time() > due + 12, 60, "a renewal of the key that nobody answers")
        finally:
            system.processes["kernelm"].send_signal(signal.SIGCONT)
        assert max(b - a for a, b in itertools.pairwise(said)) < 5.0  # the lease
        assert not member.orphaned


async def test_the_old_key_is_revoked_after_the_overlap_and_not_before(system: System) -> None:
    bus = await system.connect("gateway")
    old, seed = bus.credentials, new_seed()
    await renew(bus, seed, overlap_s=2)
    again = await Bus.connect(system.broker.url, old, timeout_s=30)  # both are good for a while
    await until(lambda: not again.connected, 15, "the old key cut off")
    with pytest.raises(Fault):
        await Bus.connect(system.broker.url, old, timeout_s=3)
    await again.close()
    assert bus.connected
    assert await bus.call(Kernel.state, Empty())
    assert system.kernel is not None
    between = bus.credentials
    await renew(bus, new_seed(), overlap_s=600)
    second = await system.track(Bus.connect(system.broker.url, between))
    await system.kernel.members.shut_out("gateway")
    await until(lambda: not bus.connected and not second.connected, 5, "all its keys cut off at once")
    with pytest.raises(Fault):
        await bus.call(Kernel.renew, RenewRequest(public_key(new_seed())), timeout_s=2)


async def test_a_name_has_one_holder(system: System) -> None:
    before = await system.connect("gateway")
    after = await system.connect("gateway")  # as a service that is started anew, while the one before is frozen somewhere
    await until(lambda: not before.connected, 5, "the one before cut off")
    assert await after.call(Kernel.state, Empty())


async def test_a_renewal_whose_answer_was_lost_is_repeated(system: System) -> None:
    assert system.kernel is not None
    bus = await system.connect("gateway")
    seed = new_seed()
    for _ in range(3):
        answer = await bus.call(Kernel.renew, RenewRequest(public_key(seed), 30))
    member = await system.kernel.members.of("gateway")
    assert (member.key, member.previous) == (public_key(seed), public_key(bus.credentials.seed))
    await system.kernel.stop()
    await system.start_kernel()  # the plan to revoke the old key is in the records
    assert public_key(bus.credentials.seed) in system.kernel.router.revoked
    await bus.renewed(Credentials("gateway", answer.jwt, seed, answer.expires))
    assert await bus.call(Kernel.state, Empty())


async def test_a_renewal_without_a_broker_leaves_everything_as_it_was(system: System) -> None:
    member = await system.plugin(ClockworkPlugin, MANIFEST)
    answer = await member.bus.call(Kernel.renew, RenewRequest(public_key(seed := new_seed())))
    system.processes["broker"].terminate()
    await asyncio.to_thread(system.processes["broker"].wait)
    with pytest.raises(Fault):
        await member.bus.renewed(Credentials(answer.user, answer.jwt, seed, answer.expires))
    system.start_broker()

    async def answered() -> bool:
        with contextlib.suppress(Fault):
            return bool(await system.admin.call(Clockwork.tick, Number(1), timeout_s=2))
        return False

    await until(answered, 20, "an answer on the connection of before")
    await member.bus.renewed(Credentials(answer.user, answer.jwt, seed, answer.expires))
    assert await system.admin.call(Clockwork.tick, Number(2)) == Number(2)
