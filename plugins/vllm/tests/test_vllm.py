"""vLLM itself behind the plugin, as the node runs it: a model that generates, one that embeds, one that classifies."""

import asyncio
import json
import math
import shutil
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import jsonschema
import msgspec
import psutil
import pytest
import pytest_asyncio

from kernelm.testing.conformance import Stand, read
from kernelm.testing.conformance.places import place_of
from kernelm.testing.conformance.stand import Instance
from kernelm.testing.harness import until
from kernelm_cli import staging
from kernelm_contracts.server import (
    ClassifyRequest,
    EmbedRequest,
    GenerateFrame,
    GenerateRequest,
    InfoRequest,
    Message,
    ModelLoading,
    Server,
    ServerInfo,
    Tool,
)  # fmt: skip
from kernelm_sdk.bus import Bus
from kernelm_sdk.errors import Fault
from kernelm_sdk.serving import DEADLINE

PLUGIN = Path(__file__).parents[1]
START = "The striker scored twice in the first half, and the crowd sang until the end of the match, which was late in the night"
SETTINGS = {"dtype": "float32", "kv_cache_mb": 64, "threads": 1}
TOOL = Tool("weather", "The weather of a city", {"type": "object", "properties": {"city": {"enum": ["Oslo", "Rome"]}},
                                                 "required": ["city"], "additionalProperties": False})  # fmt: skip
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900), pytest.mark.asyncio(loop_scope="module")]


class Running(msgspec.Struct):
    """Three pools on one stand."""

    stand: Stand
    digests: dict[str, str]
    generates: Instance
    embeds: Instance
    classifies: Instance

    @property
    def bus(self) -> Bus:
        return self.stand.bus()

    async def answer(self, **request: Any) -> tuple[str, list[GenerateFrame]]:
        """The whole text, and all frames; at temperature 0 unless the request says more."""
        wanted = GenerateRequest(**{"temperature": 0.0, **request})
        stream = self.bus.stream(Server.generate, wanted, instance=self.generates.name, idle_s=120.0)
        frames = [frame async for frame in stream]
        return "".join(frame.text for frame in frames), frames

    async def refused(self, code: str, **request: Any) -> Fault:
        with pytest.raises(Fault) as caught:
            await self.answer(**request)
        assert (caught.value.code, caught.value.whose) == (code, "client"), caught.value
        return caught.value


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def vllm(tmp_path_factory: pytest.TempPathFactory, models: Path, venvs: Path) -> AsyncIterator[Running]:
    folder = tmp_path_factory.mktemp("plugin") / "vllm"
    shutil.copytree(PLUGIN, folder, ignore=shutil.ignore_patterns("__pycache__", "tests"))
    (folder / "conformance.toml").write_text("start_s = 500\n")  # three engines start at a time
    subject = read(folder)
    async with Stand() as stand:
        (stand.system.home / "venvs").symlink_to(venvs)
        place = await place_of("venv", subject, stand.system.home, stand.bus(), lambda a, b: staging.stage(staging.find(a), b))
        digests = {name: await stand.store(models / name, kind) for name, kind in
                   (("llama", "model"), ("classes", "model"), ("adapter", "adapter"), ("stranger", "adapter"))}  # fmt: skip

        async def start(name: str, model: str, **settings: Any) -> Instance:
            served = {"name": name, "artifact": digests[model], "generation": 7}
            return await stand.start(subject, {**SETTINGS, **settings, "model": served}, place=place)

        chat = await start("chat", "llama", tool_parser="hermes", adapters=2, adapter_rank=8, sequences=2, queue=2, context=384)
        running = Running(stand, digests, chat, await start("vectors", "llama", task="embed"), await start("labels", "classes"))
        for instance in (running.generates, running.embeds, running.classifies):
            await instance.ready()
        yield running


async def test_loading_is_told_step_by_step(vllm: Running) -> None:
    told = [msgspec.json.decode(body, type=ModelLoading) for _, body, _, _ in vllm.generates.tap.of("evt.model.loading.")]
    fractions = [event.fraction for event in told]
    assert fractions == sorted(fractions)
    assert (fractions[0], fractions[-1], len(told) > 4) == (0.0, 1.0, True)
    assert {(event.model, event.generation, event.pool) for event in told} == {("chat", 7, vllm.generates.pool)}


async def test_a_chat_is_the_text_that_the_models_template_makes_of_it(vllm: Running) -> None:
    text, frames = await vllm.answer(messages=(Message("user", "Who scored?"),), max_tokens=16)
    raw, _ = await vllm.answer(prompt="<|user|>Who scored?</s>\n<|assistant|>", max_tokens=16)
    assert text == raw
    last = frames[-1]
    assert last.usage is not None
    assert (last.usage.completion_tokens, last.model, last.generation, last.artifact) == (16, "chat", 7, vllm.digests["llama"])
    whole, frames = await vllm.answer(messages=(Message("user", "Who scored?"),), max_tokens=16, stream=False)
    assert (whole, len([frame for frame in frames if frame.text])) == (text, 1)


async def test_a_prefix_that_was_read_is_not_read_again(vllm: Running) -> None:
    await vllm.answer(prompt=START * 3, max_tokens=1)
    _, frames = await vllm.answer(prompt=START * 3 + " again", max_tokens=1)
    usage = frames[-1].usage
    assert usage is not None
    assert 32 <= usage.cached_tokens < usage.prompt_tokens


async def test_an_answer_follows_its_schema(vllm: Running) -> None:
    properties = {"goals": {"enum": [1, 2]}, "who": {"enum": ["Ann", "Bo"]}}
    schema = {"type": "object", "properties": properties, "required": ["goals", "who"], "additionalProperties": False}
    for asked in ({"prompt": START}, {"messages": (Message("user", START),)}):
        text, frames = await vllm.answer(**asked, schema=schema, max_tokens=60, temperature=1.0, seed=3)
        assert frames[-1].finish_reason == "stop", text
        jsonschema.validate(json.loads(text), schema)
    await vllm.refused("invalid", prompt=START, schema={"type": "no such type"})


async def test_tools_are_called_as_the_model_s_parser_finds_it(vllm: Running) -> None:
    asked: dict[str, Any] = {"messages": (Message("user", "What is the weather in Rome?"),), "tools": (TOOL,), "max_tokens": 150,
                             "frequency_penalty": 2.0}  # or random weights may end in white space, which JSON allows  # fmt: skip
    for choice, ends in (("required", {"tool_calls", "length"}), ("weather", {"tool_calls"})):  # any number of calls, or one
        text, frames = await vllm.answer(**asked, tool_choice=choice)
        calls = [call for frame in frames for call in frame.tool_calls]
        assert (text, {call.name for call in calls}) == ("", {"weather"}), (text, frames)
        assert frames[-1].finish_reason in ends
        assert all(call.id for call in calls)
        for call in calls:
            jsonschema.validate(json.loads(call.arguments), TOOL.parameters)
    turns = (*asked["messages"], Message("assistant", "", tuple(calls)), Message("tool", "rain", (), calls[0].id))
    text, frames = await vllm.answer(messages=turns, tools=(TOOL,), tool_choice="none", max_tokens=8)
    assert text
    assert not any(frame.tool_calls for frame in frames)


async def test_an_adapter_is_loaded_at_its_first_use(vllm: Running) -> None:
    plain, _ = await vllm.answer(prompt=START, max_tokens=16)
    adapted = await asyncio.gather(*(vllm.answer(prompt=START, max_tokens=16, adapter=vllm.digests["adapter"]) for _ in range(2)))
    assert adapted[0][0] == adapted[1][0] != plain
    assert (await vllm.answer(prompt=START, max_tokens=16))[0] == plain
    await vllm.refused("invalid_adapter", prompt=START, adapter=vllm.digests["llama"])
    assert "belongs to" in (await vllm.refused("invalid_adapter", prompt=START, adapter=vllm.digests["stranger"])).message
    await vllm.refused("not_found", prompt=START, adapter="sha256:" + "ab" * 32)


async def test_sampling_is_what_was_asked_for(vllm: Running) -> None:
    greedy, _ = await vllm.answer(prompt=START, max_tokens=24)
    assert (await vllm.answer(prompt=START, max_tokens=24, temperature=1.0, top_k=1))[0] == greedy
    seeded = [(await vllm.answer(prompt=START, max_tokens=24, temperature=1.0, seed=seed))[0] for seed in (5, 5, 6)]
    assert seeded[0] == seeded[1] != seeded[2]
    again, _ = await vllm.answer(prompt=START, max_tokens=24, frequency_penalty=-2.0, presence_penalty=-2.0)
    assert len(set(again)) < len(set(greedy))  # what was said is said again


async def test_what_can_not_be_is_refused(vllm: Running) -> None:
    await vllm.refused("too_large", prompt=START * 50, max_tokens=1)
    await vllm.refused("too_large", messages=(Message("user", START * 50),), max_tokens=1)
    await vllm.refused("invalid", prompt=START, max_tokens=5000)
    assert "`tools`" in (await vllm.refused("invalid", prompt=START, tools=(TOOL,))).message


async def test_a_full_queue_says_so_and_when_to_come_back(vllm: Running) -> None:
    streams = [vllm.bus.stream(Server.generate, GenerateRequest(prompt=START, max_tokens=300, temperature=1.0, seed=k),
                               instance=vllm.generates.name, idle_s=120.0) for k in range(4)]  # fmt: skip
    for stream in streams:
        async for frame in stream:  # its place in the queue is its own from the first frame on
            assert not frame.finish_reason
            break
    fault = await vllm.refused("busy", prompt=START)
    assert fault.retriable
    assert 0 < fault.details["retry_after_s"] < 600
    for stream in streams:
        await stream.aclose()

    async def free() -> bool:
        try:
            text, _ = await vllm.answer(prompt=START, max_tokens=4)
        except Fault as fault:
            if fault.code != "busy":
                raise
            return False
        return bool(text)

    await until(free, 20, "their places")  # what has left is told to the server, not asked of it


async def test_who_is_gone_or_out_of_time_sets_the_engine_free(vllm: Running) -> None:
    engine = next(p for p in psutil.Process(vllm.generates.body._task.pid).children(recursive=True)  # type: ignore[union-attr]
                  if "EngineCore" in " ".join(p.cmdline()))  # fmt: skip
    asked = GenerateRequest(prompt=START, max_tokens=340, temperature=1.0, seed=1)
    async for _ in vllm.bus.stream(Server.generate, asked, instance=vllm.generates.name, idle_s=120.0):
        break
    late = {DEADLINE: str(time.time() + 0.2)}
    with pytest.raises(Fault) as caught:
        _ = [frame async for frame in vllm.bus.stream(Server.generate, asked, instance=vllm.generates.name, headers=late)]
    assert caught.value.code == "timeout"

    def idle() -> bool:
        before = sum(engine.cpu_times()[:2])
        time.sleep(0.5)  # the measurement itself
        return sum(engine.cpu_times()[:2]) - before < 0.1

    await until(lambda: asyncio.to_thread(idle), 10)


async def test_vectors_are_of_unit_length_and_in_order(vllm: Running) -> None:
    async def embed(*texts: str) -> Any:
        return await vllm.bus.call(Server.embed, EmbedRequest(texts), instance=vllm.embeds.name, timeout_s=60.0)

    both, one = await embed(START, "Shares fell."), await embed("Shares fell.")
    assert all(abs(math.hypot(*vector) - 1) < 1e-3 for vector in both.embeddings)
    assert sum(a * b for a, b in zip(both.embeddings[1], one.embeddings[0], strict=True)) > 0.999
    assert (both.model, both.generation, len(one.embeddings[0])) == ("vectors", 7, 64)
    with pytest.raises(Fault) as caught:
        await embed("text", " ")
    assert caught.value.code == "invalid"


async def test_classes_are_named_and_ranked(vllm: Running) -> None:
    asked = ClassifyRequest((START, "Shares fell."), top=0)
    reply = await vllm.bus.call(Server.classify, asked, instance=vllm.classifies.name, timeout_s=60.0)
    for row in reply.results:
        assert {label.label for label in row} == {"business", "sport"}
        assert row[0].score >= row[1].score
        assert abs(sum(label.score for label in row) - 1) < 1e-3
    infos = {i.name: await vllm.bus.call(Server.info, InfoRequest(), instance=i.name) for i in
             (vllm.generates, vllm.embeds, vllm.classifies)}  # fmt: skip
    methods = [infos[i.name].methods for i in (vllm.generates, vllm.embeds, vllm.classifies)]
    assert methods == [("generate",), ("embed",), ("classify",)]
    about: ServerInfo = infos[vllm.generates.name]
    assert (about.context_tokens, about.details["tools"]) == (384, "hermes")


async def test_an_instance_ends_with_its_engine(vllm: Running) -> None:
    """Last of all: the system starts another one then."""
    process = psutil.Process(vllm.classifies.body._task.pid)  # type: ignore[union-attr]
    next(p for p in process.children(recursive=True) if "EngineCore" in " ".join(p.cmdline())).kill()
    assert await vllm.classifies.ended(30) is not None
