"""Chats and completions as OpenAI's own client sees them: a real broker, a real kernel, the gateway in a process of its own, and
the mock engine of the benchmarks behind it."""

import asyncio
import json
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import msgspec
import openai
import pytest
import pytest_asyncio
from google.protobuf import message_factory

from kernelm.testing.harness import System, until
from kernelm_gateway import protobuf
from kernelm_gateway.service import Announcement
from kernelm_sdk.contract import CONTRACTS
from kernelm_sdk.plugin import read_manifest
from kernelm_sdk.system import Destination, Kernel, KeyRequest, Route

ROOT = Path(__file__).parents[3]
ENGINE = ROOT / "tests" / "benchmarks" / "mockengine"
sys.path.insert(0, str(ENGINE))
from mock_engine import MockEngine  # noqa: E402

pytestmark = pytest.mark.asyncio(loop_scope="module")
DIGEST = "sha256:" + "ef" * 32
WORD = {"type": "object", "properties": {"word": {"type": "string"}}}
TOOL: Any = {"type": "function", "function": {"name": "look_up", "description": "finds a word", "parameters": WORD}}


class World:
    """What a test has: the engines in this process, and where the gateway is."""

    def __init__(self, system: System, engines: dict[str, MockEngine], said: Announcement, secret: str) -> None:
        url = said.http
        self.system, self.engines, self.url, self.secret = system, engines, url, secret
        small = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 16384)]  # so much may come that nobody has read
        self.channel = grpc.aio.insecure_channel(said.grpc, options=small)
        self.client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=secret, max_retries=0)
        self.http = httpx.AsyncClient(base_url=url, headers={"Authorization": f"Bearer {secret}"}, timeout=20)

    def generate(self) -> tuple[Any, Any, Any]:
        """Over gRPC: the stub of Generate, its request, and the metadata with the key."""
        service = protobuf.make_pool([protobuf.describe(CONTRACTS["server/1"])]).FindServiceByName("kernelm.server.v1.Server")
        method = service.methods_by_name["Generate"]
        taken, given = map(message_factory.GetMessageClass, (method.input_type, method.output_type))
        stub = self.channel.unary_stream("/kernelm.server.v1.Server/Generate", taken.SerializeToString, given.FromString)
        return stub, taken, (("authorization", f"Bearer {self.secret}"),)

    @staticmethod
    async def stands(engine: MockEngine) -> bool:
        """Whether it makes nothing at present."""
        made = engine.generated
        await asyncio.sleep(0.3)
        return bool(engine.generated == made)

    async def raw(self, body: dict[str, Any], path: str = "/v1/completions") -> tuple[Any, asyncio.StreamWriter]:
        """A request on a socket of its own, with a small buffer to receive into."""
        host, port = self.url.removeprefix("http://").split(":")
        plain = socket.socket()
        plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        plain.setblocking(False)
        await asyncio.get_running_loop().sock_connect(plain, (host, int(port)))
        reader, writer = await asyncio.open_connection(sock=plain, limit=4096)
        data = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {self.secret}\r\nContent-Length: {len(data)}\r\n\r\n"
        writer.write(head.encode() + data)
        return reader, writer


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def world() -> AsyncIterator[World]:
    manifest = read_manifest(ENGINE / "kernelm-plugin.toml")
    engines = {}
    async with System() as system:
        for name, settings in (("words", {}), ("slow", {"token_ms": 20.0}), ("one", {"token_ms": 5.0, "slots": 1, "queue": 1}),
                               ("mortal", {"fails_after": 3})):  # fmt: skip
            model = {"name": name, "artifact": DIGEST, "generation": 7}
            member = await system.plugin(MockEngine, manifest, pool=f"{name}-g7", settings={"model": model, **settings})
            engines[name] = member.implementation
            await system.admin.call(Kernel.set_route, Route(name, "model", (Destination(f"{name}-g7", 100),), 7, DIGEST))
        await system.service("gateway", KERNELM_HTTP_PORT="0", KERNELM_GRPC_PORT="0", KERNELM_START_WAIT_S="1")
        created = await system.admin.call(Kernel.create_key, KeyRequest("all"))
        said = msgspec.json.decode((system.home / "run" / "gateway.json").read_bytes(), type=Announcement)
        world = World(system, engines, said, created.secret)
        yield world
        await world.client.close()
        await world.channel.close()
        await world.http.aclose()


async def test_a_chat_whole_and_streamed(world: World) -> None:
    ask: dict[str, Any] = {"model": "words", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 3}
    whole = await world.client.chat.completions.create(**ask)
    assert whole.object == "chat.completion"
    assert whole.id.startswith("chatcmpl-")
    choice = whole.choices[0]
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", "w0 w1 w2", "length")
    assert whole.usage is not None
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens, whole.usage.total_tokens) == (2, 3, 5)
    assert (whole.model, whole.generation, whole.artifact) == ("words", 7, DIGEST)  # type: ignore[attr-defined]

    chunks = [c async for c in await world.client.chat.completions.create(**ask, stream=True)]
    assert {c.object for c in chunks} == {"chat.completion.chunk"}
    assert len({c.id for c in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].delta.content for c in chunks[1:-1]] == ["w0", " w1", " w2"]
    assert (chunks[-1].choices[0].finish_reason, chunks[-1].usage) == ("length", None)
    ask["stream_options"] = {"include_usage": True}
    chunks = [c async for c in await world.client.chat.completions.create(**ask, stream=True)]
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage


async def test_a_completion_whole_and_streamed(world: World) -> None:
    whole = await world.client.completions.create(model="words", prompt="Count", max_tokens=4)
    assert (whole.object, whole.choices[0].text, whole.choices[0].finish_reason) == ("text_completion", "w0 w1 w2 w3", "length")
    chunks = [c async for c in await world.client.completions.create(model="words", prompt=["Count"], max_tokens=4, stream=True)]
    assert "".join(c.choices[0].text for c in chunks) == "w0 w1 w2 w3"
    assert chunks[-1].choices[0].finish_reason == "length"


async def test_tools(world: World) -> None:
    messages: Any = [{"role": "user", "content": [{"type": "text", "text": "Find"}, {"type": "text", "text": " it"}]}]
    whole = await world.client.chat.completions.create(model="words", messages=messages, tools=[TOOL])
    message = whole.choices[0].message
    assert (whole.choices[0].finish_reason, message.content) == ("tool_calls", None)
    assert message.tool_calls is not None
    call: Any = message.tool_calls[0]
    assert (call.id, call.type, call.function.name, call.function.arguments) == ("call-1", "function", "look_up", '{"word":"w0"}')
    stream = await world.client.chat.completions.create(model="words", messages=messages, tools=[TOOL], stream=True,
                                                        tool_choice=TOOL | {"function": {"name": "look_up"}})  # fmt: skip
    chunks = [chunk async for chunk in stream]
    called: Any = next(c.choices[0].delta.tool_calls for c in chunks if c.choices[0].delta.tool_calls)
    assert (called[0].index, called[0].function.name) == (0, "look_up")
    assert chunks[-1].choices[0].finish_reason == "tool_calls"
    outcome = {"role": "tool", "tool_call_id": "call-1", "content": "there"}
    chat: Any = [*messages, message.model_dump(exclude_none=True), outcome]
    again = await world.client.chat.completions.create(model="words", messages=chat, tools=[TOOL], tool_choice="none",
                                                       max_completion_tokens=1)  # fmt: skip
    assert again.choices[0].message.content == "w0"


async def test_embeddings(world: World) -> None:
    for form in ("float", "base64"):
        found = await world.client.embeddings.create(model="words", input=["a", "b"], encoding_format=form)  # type: ignore[call-overload]
        assert [row.index for row in found.data] == [0, 1]
    assert (await world.client.embeddings.create(model="words", input="a")).data[0].embedding == pytest.approx([0.6, 0.8])


async def test_a_prompt_of_50_mb(world: World) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        await world.client.completions.create(model="words", prompt="x" * 50_000_000)
    assert (caught.value.status_code, caught.value.code) == (413, "too_large")
    with pytest.raises(openai.APIStatusError) as caught:  # which the gateway takes, and the broker does not
        await world.client.completions.create(model="words", prompt="x" * 5_000_000)
    assert (caught.value.status_code, caught.value.code) == (413, "too_large")
    assert (await world.client.completions.create(model="words", prompt="x" * 500_000, max_tokens=1)).choices[0].text == "w0"


async def test_keys(world: World) -> None:
    made = await world.system.admin.call(Kernel.create_key, KeyRequest("narrow", models=("slow",)))
    client = world.client.with_options(api_key=made.secret)
    with pytest.raises(openai.PermissionDeniedError):
        await client.completions.create(model="words", prompt="x")
    with pytest.raises(openai.AuthenticationError, match="not known"):
        await client.with_options(api_key=made.secret + "x").completions.create(model="slow", prompt="x")

    brief = await world.system.admin.call(Kernel.create_key, KeyRequest("brief", expires_s=1))

    async def shut_out() -> bool:
        try:
            await client.with_options(api_key=brief.secret).completions.create(model="slow", prompt="x", max_tokens=1)
        except openai.AuthenticationError as error:
            return "expired" in str(error)
        return False

    await until(shut_out, 5, "the end of the key")


async def test_models(world: World) -> None:
    assert [m.id async for m in world.client.models.list()] == ["mortal", "one", "slow", "words"]
    assert (await world.client.models.retrieve("slow")).id == "slow"
    with pytest.raises(openai.NotFoundError):
        await world.client.models.retrieve("none")


async def test_a_client_that_leaves_stops_the_engine(world: World) -> None:
    engine = world.engines["slow"]
    for stream in (True, False):
        _, writer = await world.raw({"model": "slow", "prompt": "x", "max_tokens": 3000, "stream": stream})
        await until(lambda: engine.active == 1, 5, "the engine at work")
        writer.close()
        await until(lambda: engine.active == 0, 2, f"the engine at rest (stream: {stream})")
    stream = await world.client.completions.create(model="slow", prompt="x", max_tokens=3000, stream=True)
    async for _ in stream:
        break
    await stream.close()
    await until(lambda: engine.active == 0, 2, "the engine at rest")


async def test_a_grpc_client_that_leaves_stops_the_engine(world: World) -> None:
    engine = world.engines["slow"]
    stub, taken, metadata = world.generate()
    request = taken(model="slow", prompt="x", max_tokens=3000)
    call = stub(request, metadata=metadata)
    assert (await call.read()).text == "w0"
    call.cancel()
    await until(lambda: engine.active == 0, 2, "the engine at rest after a cancellation")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        _ = [frame async for frame in stub(request, metadata=metadata, timeout=0.5)]
    assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    await until(lambda: engine.active == 0, 2, "the engine at rest after a deadline")


async def test_a_client_that_leaves_before_the_first_word(world: World) -> None:
    """Behind another call, with only one slot: nothing has come that could be answered with a cancellation."""
    engine = world.engines["one"]
    first = asyncio.create_task(world.client.completions.create(model="one", prompt="x", max_tokens=3000))
    await until(lambda: engine.active == 1, 5, "the first call at work")
    _, writer = await world.raw({"model": "one", "prompt": "y", "max_tokens": 4000})
    await until(lambda: engine.active == 2, 5, "the second call waiting")
    writer.close()
    await until(lambda: engine.active == 1, 2, "the second call gone")
    assert not first.done()
    first.cancel()
    await until(lambda: engine.active == 0, 2, "the engine at rest")


async def test_a_full_engine_says_when_to_come_back(world: World) -> None:
    engine = world.engines["one"]
    calls = [asyncio.create_task(world.client.completions.create(model="one", prompt="x", max_tokens=3000)) for _ in range(2)]
    await until(lambda: engine.active == 2, 5, "a full queue")
    with pytest.raises(openai.RateLimitError) as caught:
        await world.client.completions.create(model="one", prompt="x", max_tokens=1)
    assert caught.value.response.headers["retry-after"] == "1"
    assert caught.value.code == "busy"
    for call in calls:
        call.cancel()
    await until(lambda: engine.active == 0, 2, "the engine at rest")


async def test_a_slow_reader_is_waited_for_and_holds_no_memory(world: World) -> None:
    """It reads nothing: what the engine makes ahead is bounded by what the sockets and one window of frames hold."""
    engine = world.engines["words"]
    before = engine.generated
    reader, writer = await world.raw({"model": "words", "prompt": "x", "max_tokens": 20_000, "stream": True})
    await until(lambda: engine.active == 1, 5, "the engine at work")

    await until(lambda: world.stands(engine), 10, "the engine waiting for the reader")
    ahead = engine.generated - before
    assert engine.active == 1
    assert ahead < 8000, ahead
    text = b""
    while b"[DONE]" not in text:
        text += await asyncio.wait_for(reader.read(65536), 60)
    assert text.count(b'"text":" w') == 19_999
    writer.close()


async def test_a_slow_reader_over_grpc_is_waited_for(world: World) -> None:
    engine = world.engines["words"]
    before = engine.generated
    stub, taken, metadata = world.generate()
    call = stub(taken(model="words", prompt="x", max_tokens=50_000), metadata=metadata)
    assert (await call.read()).text == "w0"
    await until(lambda: world.stands(engine), 10, "the engine waiting for the reader")
    assert engine.active == 1
    assert engine.generated - before < 20_000
    frames = 1
    while await call.read() is not grpc.aio.EOF:
        frames += 1
    assert frames == 50_001


@pytest.mark.parametrize(("changes", "param", "code"), [
    ({"max_tokens": -1}, "max_tokens", "invalid"), ({"max_tokens": 0}, "max_tokens", "invalid"),
    ({"temperature": 2.5}, "temperature", "invalid"), ({"top_p": 0}, "top_p", "invalid"), ({"seed": 2**70}, "seed", "invalid"),
    ({"n": 2}, "n", "unsupported_parameter"), ({"logprobs": True}, "logprobs", "unsupported_parameter"),
    ({"logit_bias": {"5": 1}}, "logit_bias", "unsupported_parameter"), ({"wibble": 1}, "wibble", "invalid"),
    ({"messages": []}, "messages", "invalid"), ({"messages": [{"role": "user"}]}, "messages[0].content", "invalid"),
    ({"messages": [{"role": "cook", "content": "x"}]}, "messages[0].role", "invalid"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
     "messages[0].content[0].type", "unsupported_parameter"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id", "invalid"),
    ({"tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice", "invalid"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema", "invalid"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "invalid"),
    ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens", "invalid"), ({"stop": ["x"] * 65}, "stop", "invalid"),
])  # fmt: skip
async def test_what_is_refused_names_the_parameter(world: World, changes: dict[str, Any], param: str, code: str) -> None:
    body = {"model": "words", "messages": [{"role": "user", "content": "Hello"}], **changes}
    answer = await world.http.post("/v1/chat/completions", json=body)
    error = answer.json()["error"]
    assert (answer.status_code, error["type"], error["param"], error["code"]) == (400, "invalid_request_error", param, code), error


async def test_nothing_has_an_effect_that_should_not(world: World) -> None:
    """null is the same as left out; parameters that change no answer are taken."""
    names = ("n", "stop", "seed", "tools", "tool_choice", "logprobs", "response_format", "logit_bias", "temperature", "top_p",
             "max_tokens", "stream", "stream_options", "user", "metadata", "parallel_tool_calls", "presence_penalty")  # fmt: skip
    body = {"model": "words", "messages": [{"role": "developer", "content": "x", "name": "me"}], **dict.fromkeys(names)}
    answer = await world.http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    taken = {"user": "u", "metadata": {"a": "b"}, "store": False, "service_tier": "auto", "n": 1, "logprobs": False}
    assert (await world.http.post("/v1/chat/completions", json=body | taken)).status_code == 200


async def test_a_fault_in_the_middle_of_a_stream_is_its_last_event(world: World) -> None:
    messages: Any = [{"role": "user", "content": "x"}]
    stream = await world.client.chat.completions.create(model="mortal", messages=messages, stream=True, max_tokens=100)
    words = []

    async def listen() -> None:
        async for chunk in stream:
            words.append(chunk.choices[0].delta.content)

    with pytest.raises(openai.APIError) as caught:
        await listen()
    assert words == ["", "w0", " w1", " w2"]
    assert caught.value.code == "engine"
    with pytest.raises(openai.InternalServerError) as whole:
        await world.client.chat.completions.create(model="mortal", messages=messages, max_tokens=100)
    assert (whole.value.status_code, whole.value.code) == (502, "engine")
