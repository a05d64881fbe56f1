"""Copies of calls on a bus in memory: who gets one, and that whoever is copied notices nothing. Real ones: services/jobs/tests."""

import asyncio
from typing import Any

import pytest

from kernelm.testing.harness import until
from kernelm_contracts.server import (
    ClassifyReply,
    ClassifyRequest,
    EmbedReply,
    Entity,
    ExtractReply,
    GenerateFrame,
    GenerateRequest,
    Label,
    Server,
    ToolCall,
)
from kernelm_contracts.shadows import Copies, Shadow
from kernelm_gateway import shadows
from kernelm_gateway.gate import Gate
from kernelm_gateway.shadows import agree
from kernelm_sdk.contract import method_of
from kernelm_sdk.errors import KernelFault
from kernelm_sdk.system import Empty

CLASSIFY, GENERATE = method_of(Server.classify), method_of(Server.generate)


@pytest.fixture
async def told(gate: Gate, bus: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Of a gateway whose deployment "news" has the shadow "next" for all calls: what it tells of copies."""
    monkeypatch.setattr(shadows, "EVERY_S", 0.02)
    found: list[Copies] = []
    bus.answers["jobs/1.compared"] = lambda request, _: found.append(request.copies) or Empty()
    bus.deployments.records["shadow.news"] = Shadow("news", "next", 100, 5.0)
    await gate.shadows.start()
    await until(lambda: gate.shadows.known, 5, "the record")
    yield found
    await gate.shadows.stop()


async def classify(gate: Gate, new_key: Any, **fields: Any) -> Any:
    return await gate.call(new_key(), CLASSIFY, ClassifyRequest(("a",), "news", **fields), "news")


async def test_a_copy_is_made_of_the_same_request_and_compared(gate: Gate, bus: Any, new_key: Any, told: Any) -> None:
    await classify(gate, new_key, at_least=3)
    await until(lambda: told, 5, "a report")
    (_, first, asked, _), (_, second, copied, _) = bus.of_models
    assert (first, second) == ("news", "next")
    assert (asked.at_least, copied.input, copied.model, copied.at_least) == (3, ("a",), "next", 0)
    assert (told[0].same, told[0].different, told[0].failed) == (1, 0, 0)
    assert told[0].took_ms > 0
    assert told[0].beside_ms > 0


async def test_one_that_fails_or_hangs_is_no_concern_of_the_caller(gate: Gate, bus: Any, new_key: Any, told: Any) -> None:
    answer, stuck = bus.answers["server/1.classify"], asyncio.Event()
    broken = KernelFault("no_responders", "nobody answers")
    bus.answers["server/1.classify"] = lambda request, model: broken if model == "next" else answer(request, model)
    assert (await classify(gate, new_key)).model == "news"
    await until(lambda: told and told[0].failed == 1, 5, "a failed copy")
    call = bus.call

    async def hanging(declared: Any, request: Any, *, model: str = "", **options: Any) -> Any:
        if model == "next":
            await stuck.wait()
        return await call(declared, request, model=model, **options)

    bus.call = hanging
    for _ in range(shadows.MOST + 3):
        assert (await classify(gate, new_key)).model == "news"
    await until(lambda: sum(copies.dropped for copies in told) == 3, 5, "those beyond the most")
    stuck.set()


async def test_a_stream_is_copied_when_it_is_over(gate: Gate, bus: Any, new_key: Any, told: Any) -> None:
    async for _ in gate.stream(new_key(), GENERATE, GenerateRequest(prompt="p", model="news"), "news"):
        assert len(bus.of_models) == 1, "not before its caller has the whole"
    await until(lambda: told and told[0].same == 1, 5, "the copy")
    frames = gate.stream(new_key(), GENERATE, GenerateRequest(prompt="p", model="news"), "news")
    await anext(frames)
    await frames.aclose()  # the caller has left
    await asyncio.sleep(0)
    assert [model for _, model, *_ in bus.of_models] == ["news", "next", "news"]


async def test_the_share_and_the_end_of_a_shadow(gate: Gate, bus: Any, new_key: Any, told: Any, monkeypatch: Any) -> None:
    drawn = iter((0.099, 0.1, 0.5))
    monkeypatch.setattr(shadows.random, "random", lambda: next(drawn))
    gate.shadows.known["news"] = Shadow("news", "next", 10, 5.0)
    chosen = [gate.shadows.copy_of(CLASSIFY, ClassifyRequest(("a",)), "news", None) is not None for _ in range(3)]
    assert chosen == [True, False, False]
    bus.deployments.records["shadow.news"] = Shadow("news", "next", 0, 5.0)
    await until(lambda: not gate.shadows.known["news"].percent, 5, "the end of it")
    monkeypatch.undo()
    assert gate.shadows.copy_of(CLASSIFY, ClassifyRequest(("a",)), "news", None) is None
    assert gate.shadows.copy_of(CLASSIFY, ClassifyRequest(("a",)), "other", None) is None


def labels(*names: str) -> list[Any]:
    return [ClassifyReply("m", 1, "", tuple((Label(name, 0.6), Label("x", 0.4)) for name in names), 1, 1.0)]


def vectors(*rows: tuple[float, ...]) -> list[Any]:
    return [EmbedReply("m", 1, "", rows, 1, 1.0)]


def entities(*found: Entity) -> list[Any]:
    return [ExtractReply("m", 1, "", (found,), 1, 1.0)]


CALL = ToolCall("1", "weather", '{"city": "Oslo"}')


@pytest.mark.parametrize(("one", "other", "same"), [
    (labels("a", "b"), labels("a", "b"), True), (labels("a", "b"), labels("a", "c"), False),
    (vectors((0.6, 0.8)), vectors((0.6, 0.8)), True), (vectors((0.6, 0.8)), vectors((0.8, 0.6)), False),
    (vectors((1.0, 0.0)), vectors((1.0,)), False), (vectors((1.0, 0.0), (0.0, 1.0)), vectors((1.0, 0.0)), False),
    (entities(Entity("person", 0, 3, 0.9)), entities(Entity("person", 0, 3, 0.5)), True),
    (entities(Entity("person", 0, 3, 0.9)), entities(), False),
    ([GenerateFrame("a"), GenerateFrame("b")], [GenerateFrame("ab")], True), ([GenerateFrame("a")], [GenerateFrame("b")], False),
    ([], [], True), ([], [GenerateFrame("b")], False),
    ([GenerateFrame(tool_calls=(CALL,))], [GenerateFrame(tool_calls=(ToolCall("2", CALL.name, CALL.arguments),))], True),
    ([GenerateFrame(tool_calls=(CALL,))], [GenerateFrame("")], False),
])  # fmt: skip
def test_what_agrees(one: list[Any], other: list[Any], same: bool) -> None:
    assert agree(one, other) is same
