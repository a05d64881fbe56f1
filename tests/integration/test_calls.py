"""Calls, streams, jobs and denials through a real broker and a real kernel."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest

from kernelm.testing.harness import System, until
from kernelm_authority.identity import Grant
from kernelm_sdk.contract import Contract, job, model_unary, streamed, unary
from kernelm_sdk.errors import ClientFault, KernelFault, PluginFault
from kernelm_sdk.plugin import Call, Job, Manifest, Plugin
from kernelm_sdk.system import Destination, Dispatch, Kernel, Route


class Text(msgspec.Struct, frozen=True):
    text: str
    count: int = 1


class Echo(Contract, name="echo", major=1):
    @unary
    async def say(self, request: Text, call: Any) -> Text: ...
    @streamed
    async def repeat(self, request: Text, call: Any) -> AsyncIterator[Text]: ...
    @job
    async def labour(self, request: Text, job: Any) -> Text: ...
    @model_unary
    async def ask(self, request: Text, call: Any) -> Text: ...


class EchoPlugin(Plugin, Echo):
    produced = begun = waiting = 0

    async def say(self, request: Text, call: Call) -> Text:
        if request.text == "bug":
            raise RuntimeError("secret detail")
        if request.text == "refuse":
            raise ClientFault("busy", "too much", "wait", retriable=True)
        return Text(f"{call.caller}: {request.text}")

    async def repeat(self, request: Text, call: Call) -> AsyncIterator[Text]:
        if request.text == "silence":
            EchoPlugin.begun, EchoPlugin.waiting = EchoPlugin.begun + 1, EchoPlugin.waiting + 1
            try:
                yield request
                await asyncio.Event().wait()
            finally:
                EchoPlugin.waiting -= 1
        for k in range(request.count):
            EchoPlugin.produced = k + 1
            yield Text(request.text, k)

    async def labour(self, request: Text, job: Job) -> Text:
        return Text(request.text)

    async def ask(self, request: Text, call: Call) -> Text:
        return Text(f"{call.model}: {request.text}")

    def models(self) -> tuple[str, ...]:
        return ("news",)


MANIFEST = Manifest("echo", "1", "echoes", ("echo/1",), f"{__name__}:EchoPlugin")


@pytest.fixture
async def system() -> AsyncIterator[System]:
    async with System() as system:
        await system.plugin(EchoPlugin, MANIFEST)
        yield system


async def test_a_call_goes_to_the_pool_and_carries_the_caller(system: System) -> None:
    assert await system.admin.call(Echo.say, Text("hi")) == Text("admin: hi")


async def test_a_route_to_a_model(system: System) -> None:
    with pytest.raises(KernelFault, match="nobody answers") as raised:
        await system.admin.call(Echo.ask, Text("hi"), model="news", timeout_s=2)
    assert raised.value.code == "no_responders"
    await system.admin.call(Kernel.set_route, Route("news", "model", (Destination("echo", 100),), 1, "sha256:0"))
    assert await system.admin.call(Echo.ask, Text("hi"), model="news") == Text("news: hi")


async def test_faults_keep_their_kind_and_hide_what_a_bug_says(system: System) -> None:
    with pytest.raises(ClientFault) as busy:
        await system.admin.call(Echo.say, Text("refuse"))
    assert (busy.value.code, busy.value.remedy, busy.value.retriable) == ("busy", "wait", True)
    with pytest.raises(PluginFault) as bug:
        await system.admin.call(Echo.say, Text("bug"))
    assert "secret" not in str(bug.value)
    with pytest.raises(ClientFault, match="text"):
        await system.admin.call(Echo.say, Dispatch("a", 1, 1, msgspec.Raw(b"{}")))


async def test_a_stream_arrives_whole_in_order_and_stops_with_its_reader(system: System) -> None:
    frames = [f.count async for f in system.admin.stream(Echo.repeat, Text("x", 1000))]
    assert frames == list(range(1000))
    async for frame in system.admin.stream(Echo.repeat, Text("x", 1_000_000)):
        if frame.count == 10:
            break
    await asyncio.sleep(0)
    before = EchoPlugin.produced
    await until(lambda: EchoPlugin.produced < 1000 and EchoPlugin.produced == before, 2)


async def test_work_that_is_silent_ends_with_its_reader_too(system: System) -> None:
    async def read_one() -> Text:
        async for frame in system.admin.stream(Echo.repeat, Text("silence")):
            return frame
        raise AssertionError("no frame came")

    EchoPlugin.begun = EchoPlugin.waiting = 0
    await asyncio.gather(*(read_one() for _ in range(5)))
    nowhere = f"_INBOX.admin.{'0' * 32}.x"  # a reader that is gone before the first frame
    await system.admin._client.publish("svc.echo.v1.repeat.admin", msgspec.json.encode(Text("silence")), reply=nowhere)
    await until(lambda: (EchoPlugin.begun, EchoPlugin.waiting) == (6, 0), 5)
    assert await system.admin.call(Echo.say, Text("hi")) == Text("admin: hi")


async def test_a_denied_call_is_an_error_at_once(system: System) -> None:
    client = await system.connect("acme", Grant("client", "acme", models=("news",), methods=("ask",)))
    with pytest.raises(ClientFault, match="acme") as denied:
        await client.call(Echo.say, Text("hi"), timeout_s=5)
    assert denied.value.code == "permission_denied"
    with pytest.raises(ClientFault, match="may not"):
        await client.follow(lambda event: asyncio.sleep(0), "evt.>")


async def test_a_job_is_not_to_be_had_past_the_job_table(system: System) -> None:
    with pytest.raises(ClientFault, match="submit"):
        await system.admin.dispatch(Echo.methods["labour"], Dispatch("j", 1, 1, msgspec.Raw(b'{"text":"x"}')), "echo-t0")


async def test_an_oversized_message_is_refused_before_it_is_sent(system: System) -> None:
    with pytest.raises(ClientFault) as large:
        await system.admin.call(Echo.say, Text("x" * 2_000_000))
    assert large.value.code == "too_large"
