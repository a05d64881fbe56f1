"""Pools replaced while calls go on: nothing lost, and back by itself when the new one is worse."""

import asyncio
from collections import Counter
from typing import Any

import msgspec
import pytest
from msgspec import Struct, structs

from kernelm.testing.harness import System, until
from kernelm_sdk.bus import Bus
from kernelm_sdk.contract import Contract, unary
from kernelm_sdk.errors import ClientFault, Fault, PluginFault
from kernelm_sdk.plugin import Plugin
from kernelm_sdk.system import (
    Bounds,
    Empty,
    Kernel,
    Lifecycle,
    LoadRequest,
    Manifest,
    PoolSpec,
    ProbeCall,
    RollbackRequest,
    ScaleRequest,
    Swap,
    SwapChanged,
    SwapRequest,
    UnloadRequest,
)


class Ask(Struct, frozen=True):
    number: int = 0


class Told(Struct, frozen=True):
    number: int
    by: str


class Teller(Contract, name="teller", major=1):
    @unary
    async def tell(self, request: Ask, call: Any) -> Told:
        """Who answers."""
        ...


class Good(Plugin, Teller):
    name = "good"

    async def tell(self, request: Ask, call: Any) -> Told:
        return Told(request.number, self.name)


class Better(Good):
    name = "better"


class Failing(Good):
    async def tell(self, request: Ask, call: Any) -> Told:
        if request.number >= 0:  # its probe goes well
            raise PluginFault("broken", "it fails on purpose")
        return Told(request.number, "failing")


class Slow(Good):
    name = "slow"

    async def tell(self, request: Ask, call: Any) -> Told:
        if request.number >= 0:
            await asyncio.sleep(0.15)
        return await super().tell(request, call)


class Unprobed(Good):
    async def tell(self, request: Ask, call: Any) -> Told:
        raise ClientFault("invalid", "it does not even answer its probe")


class Hesitant(Good):
    async def on_start(self) -> None:
        await asyncio.get_running_loop().create_future()  # it never gets ready


class Stillborn(Good):
    async def on_start(self) -> None:
        raise RuntimeError("no such device")


GOOD = Manifest("teller", "1", "tells", ("teller/1",), "tests:Good", probe=ProbeCall("teller/1.tell", {"number": -1}))
CLASSES: dict[str, type[Plugin]] = {"teller": Good, "better": Better, "failing": Failing, "slow": Slow, "unprobed": Unprobed,
                                    "stillborn": Stillborn, "hesitant": Hesitant}  # fmt: skip
MANIFESTS = {name: structs.replace(GOOD, name=name, default=name == "teller") for name in CLASSES}
PLUGINS = {name: (MANIFESTS[name], CLASSES[name]) for name in CLASSES}
WATCH = Bounds(watch_s=20.0, min_calls=10)
AT_ONCE = Bounds(watch_s=0.0)


class Load:
    """Calls at a steady rate, whatever comes back; every answer is kept."""

    def __init__(self, bus: Bus, pause_s: float = 0.002) -> None:
        self.bus, self.pause_s = bus, pause_s
        self.answers: list[Told | Fault] = []
        self._calls: set[asyncio.Task[None]] = set()
        self.sent = 0

    async def __aenter__(self) -> "Load":
        self._task = asyncio.create_task(self._run())
        return self

    async def _run(self) -> None:
        while True:
            call = asyncio.create_task(self._one(self.sent))
            self.sent += 1
            self._calls.add(call)
            call.add_done_callback(self._calls.discard)
            await asyncio.sleep(self.pause_s)

    async def _one(self, number: int) -> None:
        try:
            self.answers.append(await self.bus.call(Teller.tell, Ask(number), timeout_s=20.0))
        except Fault as fault:
            self.answers.append(fault)

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()
        if self._calls:
            await asyncio.wait(self._calls)

    @property
    def who(self) -> Counter[str]:
        return Counter(a.by if isinstance(a, Told) else a.code for a in self.answers)


async def finished(system: System, swap: Swap, timeout_s: float = 30.0) -> Swap:
    async def over() -> Swap | None:
        now = next(s for s in (await system.state()).swaps if s.id == swap.id)
        return now if now.over else None

    return await until(over, timeout_s, f"the end of swap {swap.id}")


async def phase(system: System, swap: Swap, *wanted: str) -> None:
    async def reached() -> bool:
        return any(s.id == swap.id and s.phase in wanted for s in (await system.state()).swaps)

    await until(reached, 20, f"swap {swap.id} {wanted[0]}")


async def served(system: System) -> None:
    await system.node(PLUGINS)
    await system.admin.call(Teller.tell, Ask(0), patience_s=20.0)
    await until(lambda: _ready(system), 10, "the pool")


async def _ready(system: System) -> bool:
    """Every instance has the answer to its `ready`: from here on the kernel may die."""
    assert system.kernel
    return system.kernel.router.health == "in force" and all(i.state == "ready" for i in (await system.state()).instances)


@pytest.fixture
async def system() -> Any:
    async with System(manifests=MANIFESTS) as system:
        await served(system)
        yield system


async def test_a_plugin_is_replaced_under_load_and_nothing_is_lost(system: System) -> None:
    events: list[SwapChanged] = []

    async def note(event: Any) -> None:
        events.append(msgspec.json.decode(event.body, type=SwapChanged))

    await system.admin.follow(note, "evt.swap.>")
    async with Load(system.admin) as load:
        await until(lambda: load.who["good"] > 50)
        swap = await system.admin.call(Kernel.load, LoadRequest("better", replaces="teller", bounds=AT_ONCE, why="it is better"))
        done = await finished(system, swap)
        await until(lambda: load.who["better"] > 50)
    assert done.phase == "done", done
    assert load.who.keys() == {"good", "better"}
    assert len(load.answers) == load.sent
    first = next(i for i, a in enumerate(load.answers) if isinstance(a, Told) and a.by == "better")
    assert load.answers[-1].by == "better"  # type: ignore[union-attr]
    assert first > 50
    await until(lambda: [e.swap.phase for e in events][-1:] == ["done"])
    assert [e.swap.phase for e in events] == ["starting", "retiring", "done"]
    assert {(e.swap.by, e.swap.why, e.swap.before, e.swap.pool) for e in events} == {("admin", "it is better", "teller", "better")}
    state = await system.state()
    assert next(r for r in state.routes if r.name == "teller/1").generation == 2
    assert {p.pool: p.parked for p in state.pools} == {"teller": True, "better": False}


async def test_a_canary_gets_its_share_and_then_everything(system: System) -> None:
    async with Load(system.admin) as load:
        bounds = Bounds(watch_s=2.0, latency_ms=10_000)
        swap = await system.admin.call(Kernel.load, LoadRequest("better", replaces="teller/1", canary=20, bounds=bounds))
        await phase(system, swap, "watching")
        load.answers.clear()
        await phase(system, swap, "retiring", "done")
        share = load.who["better"] / len(load.answers)
        assert (await finished(system, swap)).phase == "done"
        await until(lambda: isinstance(load.answers[-1], Told) and load.answers[-1].by == "better")
    assert 0.08 < share < 0.4, share
    assert load.who.keys() <= {"good", "better"}


@pytest.mark.parametrize(("plugin", "reason"), [("failing", "calls failed"), ("slow", "p99 is over")])
async def test_a_worse_canary_goes_back_by_itself(system: System, plugin: str, reason: str) -> None:
    async with Load(system.admin) as load:
        await until(lambda: load.who["good"] > 50)
        swap = await system.admin.call(Kernel.load, LoadRequest(plugin, replaces="teller", canary=25, bounds=WATCH))
        over = await finished(system, swap)
        load.answers.clear()
        await until(lambda: load.who["good"] > 50)
    assert (over.phase, reason in over.outcome) == ("rolled_back", True), over
    state = await system.state()
    assert [(p.pool, p.parked) for p in state.pools] == [("teller", False)]
    assert [d.weight for d in state.routes[-1].to] == [100]


@pytest.mark.parametrize(("plugin", "reason"), [("stillborn", "no such device"), ("unprobed", "failed its probe")])
async def test_what_does_not_prove_itself_never_gets_a_call(system: System, plugin: str, reason: str) -> None:
    async with Load(system.admin) as load:
        swap = await system.admin.call(Kernel.load, LoadRequest(plugin, replaces="teller", bounds=AT_ONCE))
        over = await finished(system, swap)
        assert (over.phase, reason in over.outcome) == ("failed", True), over
        await until(lambda: len(load.answers) > 50)
    assert load.who.keys() == {"good"}
    assert [p.pool for p in (await system.state()).pools] == ["teller"]


async def test_a_crash_in_the_watch_brings_the_old_one_back(system: System) -> None:
    node = await system.node(PLUGINS, "node-second")
    spec = PoolSpec("better", "better", node="second")
    request = SwapRequest(spec, ("teller/1",), "teller", bounds=WATCH)
    swap = await system.admin.call(Kernel.swap, request)
    await phase(system, swap, "watching")
    await node.kill(node.started[-1])
    over = await finished(system, swap)
    assert over.phase == "rolled_back", over
    assert (await system.admin.call(Teller.tell, Ask(1), patience_s=5.0)).by == "good"


async def test_a_rollback_during_the_watch_and_one_after_it(system: System) -> None:
    swap = await system.admin.call(Kernel.load, LoadRequest("better", replaces="teller", bounds=WATCH))
    await phase(system, swap, "watching")
    assert (await system.admin.call(Teller.tell, Ask(1))).by == "better"
    await system.admin.call(Kernel.rollback, RollbackRequest("better", "I do not like it"))
    over = await finished(system, swap)
    assert over.phase == "rolled_back"
    assert "I do not like it" in over.outcome
    assert (await system.admin.call(Teller.tell, Ask(2))).by == "good"

    swap = await finished(system, await system.admin.call(Kernel.load, LoadRequest("better", replaces="teller", bounds=AT_ONCE)))
    assert swap.phase == "done", swap  # though instances of the one that went back may still be ending
    back = await finished(system, await system.admin.call(Kernel.rollback, RollbackRequest("teller/1")))
    assert (back.phase, back.pool, back.before) == ("done", "teller", swap.pool)
    assert (await system.admin.call(Teller.tell, Ask(3))).by == "good"
    with pytest.raises(ClientFault, match="no pool, plugin or contract 'failing'"):
        await system.admin.call(Kernel.rollback, RollbackRequest("failing"))


async def test_a_swap_that_is_called_back_before_it_was_ready_has_not_failed(system: System) -> None:
    swap = await system.admin.call(Kernel.load, LoadRequest("hesitant", replaces="teller", bounds=AT_ONCE))
    await system.admin.call(Kernel.rollback, RollbackRequest("hesitant", "a mistake"))
    over = await finished(system, swap)
    assert (over.phase, "a mistake" in over.outcome) == ("rolled_back", True), over
    assert (await system.admin.call(Teller.tell, Ask(1))).by == "good"


@pytest.mark.parametrize("wanted", ["starting", "watching"])
async def test_a_kernel_that_dies_in_the_middle_goes_on_where_it_was(system: System, wanted: str) -> None:
    bounds = Bounds(watch_s=3.0, latency_ms=10_000)
    async with Load(system.admin) as load:
        swap = await system.admin.call(Kernel.load, LoadRequest("better", replaces="teller", canary=50, bounds=bounds))
        await phase(system, swap, wanted)
        assert system.kernel
        await system.kernel.stop()
        sent = load.sent
        await until(lambda: load.sent > sent + 50)  # nobody needs a kernel
        await system.start_kernel()
        assert (await finished(system, swap)).phase == "done"
        await until(lambda: isinstance(load.answers[-1], Told) and load.answers[-1].by == "better")
    assert load.who.keys() <= {"good", "better"}, load.who
    assert len(load.answers) == load.sent


async def test_what_was_replaced_does_not_come_back_with_the_next_kernel(system: System) -> None:
    await finished(system, await system.admin.call(Kernel.load, LoadRequest("better", replaces="teller", bounds=AT_ONCE)))
    assert system.kernel
    await system.kernel.stop()
    await system.start_kernel()
    state = await system.state()
    assert {p.pool: p.parked for p in state.pools} == {"teller": True, "better": False}
    assert next(r for r in state.routes if r.name == "teller/1").to[0].pool == "better"


async def test_a_contract_that_is_served_is_not_stolen(system: System) -> None:
    with pytest.raises(ClientFault, match="is served by pool teller"):
        await system.admin.call(Kernel.load, LoadRequest("better"))
    await system.pool(PoolSpec("better", "better"))  # runs beside, and gets no calls
    assert {(await system.admin.call(Teller.tell, Ask(k))).by for k in range(20)} == {"good"}


async def test_unload_and_scale(system: System) -> None:
    with pytest.raises(ClientFault, match="nobody else would"):
        await system.admin.call(Kernel.unload, UnloadRequest("teller"))
    await system.admin.call(Kernel.scale, ScaleRequest("teller", 3))

    async def count() -> int:
        return sum(i.pool == "teller" and i.state == "ready" for i in (await system.state()).instances)

    await until(lambda: _is(count(), 3), 20)
    with pytest.raises(ClientFault, match="from 1 on"):
        await system.admin.call(Kernel.scale, ScaleRequest("teller", 0))
    await system.admin.call(Kernel.unload, UnloadRequest("teller", force=True))
    await until(lambda: _is(count(), 0), 20)
    async with asyncio.timeout(60.0):  # at once, and not only after the call's time
        with pytest.raises(Fault, match="nobody answers"):
            await system.admin.call(Teller.tell, Ask(1), timeout_s=300.0)
    swap = await finished(system, await system.admin.call(Kernel.load, LoadRequest("better")))
    assert (swap.phase, swap.before) == ("done", "")
    assert (await system.admin.call(Teller.tell, Ask(1))).by == "better"


async def _is(coroutine: Any, value: int) -> bool:
    return await coroutine == value


async def test_a_plugin_that_is_installed_while_the_kernel_runs_can_be_loaded(system: System) -> None:
    swap = await finished(system, await system.admin.call(Kernel.load, LoadRequest("better", replaces="teller", bounds=AT_ONCE)))
    MANIFESTS["late"] = structs.replace(GOOD, name="late", default=False)
    try:
        with pytest.raises(ClientFault, match="plugin 'late' does not run as"):
            await system.admin.call(Kernel.load, LoadRequest("late", replaces="teller/1", runtime="container"))
    finally:
        del MANIFESTS["late"]
    assert swap.phase == "done"


async def test_a_plugins_name_means_what_runs_of_it_and_not_what_is_parked(system: System) -> None:
    await finished(system, await system.admin.call(Kernel.load, LoadRequest("teller", replaces="teller", bounds=AT_ONCE)))
    assert {p.pool: p.parked for p in (await system.state()).pools} == {"teller": True, "teller-g2": False}
    with pytest.raises(ClientFault, match="pool teller-g2 serves"):
        await system.admin.call(Kernel.unload, UnloadRequest("teller"))
    assert (await system.admin.call(Teller.tell, Ask(1))).by == "good"


async def test_a_replacement_has_as_many_instances_as_what_it_replaces(system: System) -> None:
    await system.admin.call(Kernel.scale, ScaleRequest("teller", 2))
    await finished(system, await system.admin.call(Kernel.load, LoadRequest("better", replaces="teller", bounds=AT_ONCE)))
    assert next(p for p in (await system.state()).pools if p.pool == "better").instances == 2


async def test_the_kernels_own_probes_are_no_calls(system: System) -> None:
    instance = next(i.id for i in (await system.state()).instances if i.pool == "teller")
    before = await system.admin.call(Lifecycle.probe, Empty(), instance=instance)
    for _ in range(3):
        await system.admin.call(Lifecycle.probe, Empty(), instance=instance)
    await system.admin.call(Teller.tell, Ask(1))
    after = await system.admin.call(Lifecycle.probe, Empty(), instance=instance)
    assert after.answered - before.answered == 1


@pytest.mark.parametrize(("request_", "words"), [
    (LoadRequest("nobody", replaces="teller"), "not installed"), (LoadRequest("better", replaces="nobody"), "no pool, plugin or"),
    (LoadRequest("better", replaces="teller", canary=100), "1 to 99"), (LoadRequest("better", canary=5), "is served by"),
    (LoadRequest("better", replaces="teller", runtime="container"), "does not run as"),
    (LoadRequest(manifest="name = 3", source="sha256:00"), "manifest"), (LoadRequest(manifest="name = 3", source="x"), "no digest"),
])  # fmt: skip
async def test_bad_requests_are_refused_and_change_nothing(system: System, request_: LoadRequest, words: str) -> None:
    with pytest.raises(ClientFault, match=words):
        await system.admin.call(Kernel.load, request_)
    state = await system.state()
    assert [p.pool for p in state.pools] == ["teller"]
    assert state.swaps == ()


async def test_two_swaps_do_not_meet(system: System) -> None:
    swap = await system.admin.call(Kernel.load, LoadRequest("better", replaces="teller", bounds=WATCH))
    with pytest.raises(ClientFault, match=swap.id):
        await system.admin.call(Kernel.load, LoadRequest("slow", replaces="teller", bounds=WATCH))


async def test_safe_mode_starts_no_strangers() -> None:
    async with System(manifests=MANIFESTS) as system:
        await served(system)
        assert system.kernel
        await system.kernel.stop()
        await system.start_kernel(safe=True)
        await system.admin.call(Kernel.scale, ScaleRequest("teller", 2))
        for _ in range(2):
            await system.kernel.supervisor.reconcile()
        assert sum(i.pool == "teller" and i.state != "exited" for i in (await system.state()).instances) == 1
        assert "safe mode" in (await system.state()).health["pool teller"]
