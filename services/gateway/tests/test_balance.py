"""Who gets a call: equal beginnings meet, nobody gets too much, and what is not known is left to the broker."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import pytest

from kernelm_contracts.server import ClassifyRequest, GenerateRequest, Message, Server
from kernelm_gateway import balance
from kernelm_gateway.balance import Balancer
from kernelm_sdk.contract import method_of
from kernelm_sdk.errors import ClientFault, KernelFault
from kernelm_sdk.system import Destination, Instance, Route, SystemState

CLASSIFY, GENERATE = method_of(Server.classify), method_of(Server.generate)


def state(*destinations: tuple[str, int], ready: int = 4) -> SystemState:
    instances = [Instance(f"{pool}-{k}", "encoder", "1", pool, "local", "ready" if k < ready else "draining", models=("news",))
                 for pool, _ in destinations for k in range(4)]  # fmt: skip
    return SystemState(tuple(instances), (), (Route("news", "model", tuple(Destination(*d) for d in destinations), 3),), 1)


@pytest.fixture
async def balancer(bus: Any) -> AsyncIterator[Balancer]:
    bus.answers["kernel/1.state"] = lambda *_: state(("p", 100))
    made = Balancer(bus)
    await made.start()
    yield made
    await made.stop()


async def known(balancer: Balancer, bus: Any) -> None:
    """One call, after which the kernel was asked."""
    await balancer.call(CLASSIFY, ClassifyRequest(("a",)), "news")
    async with asyncio.timeout(60):
        await balancer._asking  # type: ignore[misc]
    bus.instances.clear()


async def test_equal_beginnings_go_to_one_instance(balancer: Balancer, bus: Any) -> None:
    await known(balancer, bus)
    seen = {}
    for k in range(40):
        system = Message("system", f"You are number {k}. " + "Be brief. " * 60)
        for turn in range(3):
            bus.instances.clear()
            request = GenerateRequest((system, Message("user", f"question {turn}")))
            _ = [frame async for frame in balancer.stream(GENERATE, request, "news")]
            seen.setdefault(k, set()).add(bus.instances[0])
    assert all(len(instances) == 1 for instances in seen.values())
    assert len(set.union(*seen.values())) == 4, "and different ones are spread"


async def test_no_instance_gets_more_than_its_share(balancer: Balancer, bus: Any) -> None:
    """64 calls of one prompt, none of which ends."""
    await known(balancer, bus)
    going, release = [], asyncio.Event()

    async def held(*_: Any, **options: Any) -> AsyncIterator[Any]:
        bus.instances.append(options["instance"])
        await release.wait()
        yield None

    bus.stream = held

    async def one() -> None:
        async for _ in balancer.stream(GENERATE, GenerateRequest(prompt="the same"), "news"):
            pass

    for _ in range(64):
        going.append(asyncio.create_task(one()))
        await asyncio.sleep(0)  # it picks, and waits
    counts = Counter(bus.instances)
    assert max(counts.values()) <= balance.math.ceil(balance.FACTOR * 64 / 4)
    assert min(counts.values()) >= 4
    release.set()
    await asyncio.gather(*going)
    assert balancer._load == {}


async def test_without_a_prompt_the_least_busy_is_taken(balancer: Balancer, bus: Any) -> None:
    await known(balancer, bus)
    with balancer._under_way("p-0"), balancer._under_way("p-1"), balancer._under_way("p-3"):
        for _ in range(5):
            await balancer.call(CLASSIFY, ClassifyRequest(("a",)), "news")
    assert set(bus.instances) == {"p-2"}


async def test_weights_are_the_brokers(balancer: Balancer, bus: Any) -> None:
    bus.answers["kernel/1.state"] = lambda *_: state(("p", 90), ("q", 10))
    await known(balancer, bus)
    await balancer.call(CLASSIFY, ClassifyRequest(("a",)), "news")
    assert bus.instances == []


async def test_who_drains_gets_nothing(balancer: Balancer, bus: Any) -> None:
    bus.answers["kernel/1.state"] = lambda *_: state(("p", 100), ready=2)
    await known(balancer, bus)
    for _ in range(30):
        await balancer.call(CLASSIFY, ClassifyRequest(("a",)), "news")
    assert set(bus.instances) == {"p-0", "p-1"}


async def test_a_change_of_routes_is_heeded_at_once(balancer: Balancer, bus: Any) -> None:
    await known(balancer, bus)
    await bus.handlers["evt.route.>"](None)
    await balancer.call(CLASSIFY, ClassifyRequest(("a",)), "news")
    assert bus.instances == [], "until the kernel has said what holds now"


async def test_an_instance_that_is_gone_costs_no_call(balancer: Balancer, bus: Any) -> None:
    await known(balancer, bus)
    answer, call, stream = bus.answers["server/1.classify"], bus.call, bus.stream
    gone = KernelFault("no_responders", "nobody answers", retriable=True)

    async def failing(*given: Any, **options: Any) -> Any:
        if options.get("instance"):
            raise gone
        return await call(*given, **options)

    async def failing_stream(*given: Any, **options: Any) -> AsyncIterator[Any]:
        if options.get("instance"):
            raise gone
        async for frame in stream(*given, **options):
            yield frame

    bus.call, bus.stream = failing, failing_stream
    assert (await balancer.call(CLASSIFY, ClassifyRequest(("a",)), "news")) == answer(ClassifyRequest(("a",)), "news")
    await known(balancer, bus)
    assert [f.text async for f in balancer.stream(GENERATE, GenerateRequest(prompt="a"), "news")] == ["w0", "w1", ""]


async def test_one_that_others_keep_busy_is_not_the_last_word(balancer: Balancer, bus: Any) -> None:
    await known(balancer, bus)
    call = bus.call

    async def busy(*given: Any, **options: Any) -> Any:
        if options.get("instance"):
            bus.instances.append(options["instance"])
            raise ClientFault("busy", "32 calls wait", retriable=True)
        return await call(*given, **options)

    bus.call = busy
    for _ in range(2):
        assert (await balancer.call(CLASSIFY, ClassifyRequest(("a",)), "news")).model == "news"
    assert len(bus.instances) == 2, "it is still asked first"


async def test_without_a_kernel_the_broker_chooses(balancer: Balancer, bus: Any) -> None:
    bus.answers["kernel/1.state"] = lambda *_: KernelFault("no_responders", "nobody", retriable=True)
    await known(balancer, bus)
    await balancer.call(CLASSIFY, ClassifyRequest(("a",)), "news")
    assert bus.instances == []
