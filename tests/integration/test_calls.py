"""Calls, streams, jobs and denials through a real broker and a real kernel."""

import asyncio
import threading
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec
import pytest

from kernelm.testing.harness import System, until
from kernelm_authority.identity import Grant
from kernelm_sdk.bus import Bus, Credentials
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
    read = threading.Event()  # by the reader of a "busy" stream: its first frame
    late: asyncio.Event  # what a "late" stream waits for before its first frame

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
        if request.text == "busy":  # its event loop does nothing else until the first frame was read
            yield request
            yield Text(str(EchoPlugin.read.wait(20)))
            return
        if request.text == "late":
            await EchoPlugin.late.wait()
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
        await system.admin.call(Echo.ask, Text("hi"), model="news", timeout_s=30)
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


async def test_the_first_frame_leaves_before_the_handler_goes_on(system: System) -> None:
    async def read(url: str, credentials: Credentials) -> list[str]:
        texts, bus = list[str](), await Bus.connect(url, credentials)
        async for frame in bus.stream(Echo.repeat, Text("busy")):
            EchoPlugin.read.set()
            texts.append(frame.text)
        await bus.close()
        return texts

    client = await system.connect("reader", Grant("admin", "reader"))
    with ThreadPoolExecutor(1) as elsewhere:  # an event loop that goes on meanwhile
        reading = elsewhere.submit(lambda: asyncio.run(read(system.broker.url, client.credentials)))
        assert await asyncio.wrap_future(reading) == ["busy", "True"]


async def test_a_stream_arrives_whole_in_order_and_stops_with_its_reader(system: System) -> None:
    frames = [f.count async for f in system.admin.stream(Echo.repeat, Text("x", 1000))]
    assert frames == list(range(1000))
    async for frame in system.admin.stream(Echo.repeat, Text("x", 1_000_000)):
        if frame.count == 10:
            break

    async def stands() -> bool:
        before = EchoPlugin.produced
        await asyncio.sleep(0.2)
        return EchoPlugin.produced == before

    await until(stands, 30, "the producer's end")
    assert EchoPlugin.produced < 1_000_000


async def test_a_stream_may_be_silent_for_so_long_and_its_reader_slower_than_that(system: System) -> None:
    taken = []
    async for frame in system.admin.stream(Echo.repeat, Text("x", 3), idle_s=2.0):
        taken.append(frame.count)
        await asyncio.sleep(2.5 if frame.count == 0 else 0.0)  # it is no silence where the frames lie there
    assert taken == [0, 1, 2]
    begun = asyncio.get_running_loop().time()
    with pytest.raises(KernelFault, match=r"within 0\.3 s") as caught:
        _ = [frame async for frame in system.admin.stream(Echo.repeat, Text("silence"), idle_s=0.3)]
    assert caught.value.code == "timeout"
    assert asyncio.get_running_loop().time() - begun >= 0.29, "not before its time (the loop's clock counts milliseconds)"
    await until(lambda: EchoPlugin.waiting == 0, 20, "the producer's end")


async def test_a_reader_who_left_before_the_first_frame_stops_the_producer(system: System) -> None:
    """It could not cancel, since the address for that comes with a frame; what comes for it then is answered for it."""
    EchoPlugin.late, EchoPlugin.produced = asyncio.Event(), 0
    with pytest.raises(KernelFault) as caught:
        _ = [frame async for frame in system.admin.stream(Echo.repeat, Text("late", 1_000_000), idle_s=0.2)]
    assert caught.value.code == "timeout"
    EchoPlugin.late.set()
    member = system._members[-1][0]
    assert member.served is not None
    await until(lambda: not member.served or not member.served.tasks, 5, "the producer's end")
    assert 0 < EchoPlugin.produced <= 64


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
        await client.call(Echo.say, Text("hi"), timeout_s=30)
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
