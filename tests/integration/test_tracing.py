"""Traces: a call, a stream and a job as one tree each, received by a real OTLP endpoint; and what no span may hold."""

import asyncio
import contextlib
import subprocess
import sys
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest
from msgspec import Struct
from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from kernelm.testing.harness import System, until
from kernelm.testing.otlp import Collector
from kernelm_sdk import otlp, spans, tracing
from kernelm_sdk.contract import Contract, job, method_of, streamed, unary
from kernelm_sdk.errors import ClientFault
from kernelm_sdk.plugin import Manifest, Plugin
from kernelm_sdk.system import Dispatch

SECRET = "the patient's name is Ada Lovelace"


class TracedText(Struct, frozen=True):
    text: str


class TracedEcho(Contract, name="traced-echo", major=1):
    """Says what it hears."""

    @unary
    async def say(self, request: TracedText, call: Any) -> TracedText:
        """Once."""
        ...

    @unary
    async def pass_on(self, request: TracedText, call: Any) -> TracedText:
        """By another call."""
        ...

    @streamed
    async def repeat(self, request: TracedText, call: Any) -> AsyncIterator[TracedText]:
        """Three times."""
        ...

    @job
    async def ponder(self, request: TracedText, job: Any) -> TracedText:
        """In a job."""
        ...


class EchoPlugin(Plugin, TracedEcho):
    async def say(self, request: TracedText, call: Any) -> TracedText:
        if request.text == "fail":
            raise ClientFault("too_sad", SECRET)
        return request

    async def pass_on(self, request: TracedText, call: Any) -> TracedText:
        return await self.context.bus.call(TracedEcho.say, request)

    async def repeat(self, request: TracedText, call: Any) -> AsyncIterator[TracedText]:
        for _ in range(3):
            yield request

    async def ponder(self, request: TracedText, job: Any) -> TracedText:
        return await self.context.bus.call(TracedEcho.say, request)


class Watched(Collector):
    """Knows whose spans it waits for."""

    def __init__(self) -> None:
        super().__init__()
        self.members: list[str] = []

    def tree(self) -> set[tuple[str, str]]:
        """(name of the parent, name) of all spans, "" for the parent of a root."""
        for member in self.members:
            spans.provider(member).force_flush()
        names = {s.span_id: s.name for s in self.spans}
        return {(names.get(s.parent_span_id, "" if not s.parent_span_id else "?"), s.name) for s in self.spans}


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch):
    collector = Watched()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)

    made = spans.tracer

    def noted(member: str) -> trace.Tracer:
        collector.members.append(member)
        return made(member)

    monkeypatch.setattr(spans, "tracer", noted)  # to wait for what they send
    spans.source.cache_clear()
    tracing.asked_for.cache_clear()
    yield collector
    tracing.asked_for.cache_clear()
    for member in collector.members:
        spans.provider(member).shutdown()
    spans.source.cache_clear()
    collector.close()


@pytest.fixture
async def system(collector: Watched):
    async with System() as system:
        manifest = Manifest("traced-echo", "1.0.0", "", ("traced-echo/1",), "x:Y", calls=("traced-echo/1",))
        await system.plugin(EchoPlugin, manifest)
        yield system


async def test_a_call_is_one_tree_from_the_caller_through_two_handlers(system: System, collector: Watched) -> None:
    bus = await system.track(spans.TracedBus.connect(system.broker.url, system.authority.credentials("caller")))
    assert (await bus.call(TracedEcho.pass_on, TracedText(SECRET))).text == SECRET
    name, inner = "traced-echo/1/pass-on", "traced-echo/1/say"
    await until(lambda: collector.tree() >= {("", name), (name, name), (name, inner), (inner, inner)}, 10, "the tree")
    assert len({s.trace_id for s in collector.spans}) == 1
    assert SECRET.encode() not in collector.raw


async def test_a_fault_is_its_code_and_not_its_text(system: System, collector: Watched) -> None:
    bus = await system.track(spans.TracedBus.connect(system.broker.url, system.authority.credentials("caller")))
    with pytest.raises(ClientFault):
        await bus.call(TracedEcho.say, TracedText("fail"))
    await until(lambda: collector.tree() and len(collector.spans) == 2, 10, "two spans")
    for span in collector.spans:
        assert span.status.message == "too_sad"
        assert {a.key: a.value.string_value for a in span.attributes}["error.type"] == "too_sad"
    assert SECRET.encode() not in collector.raw


async def test_a_stream_is_a_tree_also_where_the_reader_leaves(system: System, collector: Watched) -> None:
    bus = await system.track(spans.TracedBus.connect(system.broker.url, system.authority.credentials("caller")))
    async for _ in bus.stream(TracedEcho.repeat, TracedText("a")):
        assert not trace.get_current_span().get_span_context().is_valid  # the reader's own calls are not the stream's
    async for _ in bus.stream(TracedEcho.repeat, TracedText("b")):
        break
    name = "traced-echo/1/repeat"
    await until(lambda: collector.tree() >= {("", name), (name, name)} and len(collector.spans) == 4, 10, "both trees")
    assert len({s.trace_id for s in collector.spans}) == 2
    assert all(s.events[0].name == "first frame" for s in collector.spans)


async def test_a_job_goes_on_with_the_trace_of_who_submitted_it(system: System, collector: Watched) -> None:
    bus = await system.track(spans.TracedBus.connect(system.broker.url, system.authority.credentials("jobs")))
    tracer = spans.tracer("jobs")
    with tracer.start_as_current_span("submit"):
        header = spans.injected()["traceparent"]
    work = Dispatch("j1", 1, 1, msgspec.Raw(msgspec.json.encode(TracedText(SECRET))), trace=header)
    await bus.dispatch(method_of(TracedEcho.ponder), work, "traced-echo-t0")
    ponder, say = "traced-echo/1/ponder", "traced-echo/1/say"
    working = "work traced-echo/1.ponder"
    wanted = {("", "submit"), ("submit", ponder), (ponder, working), (working, say), (say, say)}
    await until(lambda: collector.tree() >= wanted, 10, "the tree")
    assert SECRET.encode() not in collector.raw


async def test_a_trace_that_is_not_sampled_is_passed_on_and_not_recorded(system: System, collector: Watched,
                                                                         monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "parentbased_always_off")
    bus = await system.track(spans.TracedBus.connect(system.broker.url, system.authority.credentials("quiet")))
    with tracing.door(bus, method_of(TracedEcho.pass_on)):
        header = tracing.parent()
        assert header.endswith("-00")
        assert (await bus.call(TracedEcho.pass_on, TracedText("x"))).text == "x"
    tracing.arrived(f"{header[:-2]}01")
    assert (await bus.call(TracedEcho.say, TracedText("y"))).text == "y"
    await until(lambda: collector.tree() and len(collector.spans) == 2, 10, "the call of a caller who samples")
    assert {(s.name, s.trace_id.hex()) for s in collector.spans} == {("traced-echo/1/say", header[3:35])}


def test_a_span_is_encoded_as_the_library_would(collector: Watched) -> None:
    """Whatever a plugin has put on it; also where the library's own way is all there is."""
    made, tracer = spans.provider("encoder-of-spans"), spans.tracer("encoder-of-spans")
    carrier = {"traceparent": f"00-{'a' * 32}-{'b' * 16}-01", "tracestate": "vendor=1"}
    odd = {"text": "é", "none": None, "yes": True, "one": 1, "half": 0.5, "raw": b"\x00", "list": ["a", "b"], "map": {"k": 2},
           "long": "x" * 500}  # fmt: skip
    with spans.span(tracer, "outer", trace.SpanKind.SERVER, odd, carrier) as outer:
        outer.add_event("seen", {"count": 3})
        outer.add_link(trace.SpanContext(5, 6, True), {"why": "asked"})
        with contextlib.suppress(ClientFault), spans.span(tracer, "inner", trace.SpanKind.CLIENT, {}) as inner:
            assert trace.get_current_span() is inner
            inner.record_exception(ValueError("of a plugin"))
            raise ClientFault("too_sad", SECRET)
    with made.get_tracer("a-plugin").start_as_current_span("the plugin's own"):
        pass
    made.force_flush()
    sent = sorted((s for s in collector.spans), key=lambda s: s.name)
    assert [s.name for s in sent] == ["inner", "outer", "the plugin's own"]
    wanted = encode_spans([inner.readable(made), outer.readable(made)]).resource_spans[0]
    for ours, theirs in zip(sent, wanted.scope_spans[0].spans, strict=False):
        theirs.ClearField("status") if not theirs.status.code else None  # an empty one says as much as none
        assert ours == theirs
    whole = ExportTraceServiceRequest.FromString(otlp.request(made, [inner, outer])).resource_spans[0]
    assert (whole.resource, whole.scope_spans[0].scope) == (wanted.resource, wanted.scope_spans[0].scope)
    assert (sent[1].trace_id.hex(), sent[1].parent_span_id.hex(), sent[1].trace_state) == ("a" * 32, "b" * 16, "vendor=1")
    assert (sent[0].status.message, sent[0].events[0].name, sent[1].links[0].span_id[-1]) == ("too_sad", "exception", 6)
    assert outer.end_time
    outer.set_attribute("late", 1)
    assert "late" not in outer.attributes, "it is over"


A, B = "a" * 32, "b" * 16
NO_SPAN = ["", "00-0-0-01", "x" * 55, f"00-{'0' * 32}-{B}-01", f"00-{A}-{'0' * 16}-01", f"ff-{A}-{B}-01", f"00-{A.upper()}-{B}-01",
           f"00-{A}-{B}-01-x"]  # fmt: skip


@pytest.mark.parametrize("header", NO_SPAN)
def test_a_header_that_names_no_span_begins_a_trace(header: str, collector: Watched) -> None:
    with spans.span(spans.tracer("begins"), "first", trace.SpanKind.SERVER, {}, {"traceparent": header}) as first:
        assert first.parent is None
        assert first.context.trace_id not in (0, int("a" * 32, 16))


def test_without_the_exporters_inner_client_the_librarys_way_is_taken(collector: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    made, exporter, taken = spans.provider("older"), otlp.Exporter(), list[Any]()
    exporter.provider = made
    monkeypatch.delattr(exporter, "_client")
    monkeypatch.setattr(otlp.OTLPSpanExporter, "export", lambda _, given: taken.extend(given) or otlp.SpanExportResult.SUCCESS)
    with spans.tracer("older").start_as_current_span("one") as one:
        pass
    assert exporter.export([one]) is otlp.SpanExportResult.SUCCESS
    (sent,) = taken
    assert (type(sent), sent.name, sent.context, sent.end_time) == (otlp.ReadableSpan, "one", one.context, one.end_time)
    monkeypatch.undo()


async def test_members_begin_no_trace_of_their_own(system: System, collector: Watched) -> None:
    member_bus = await system.track(spans.TracedBus.connect(system.broker.url, system.authority.credentials("member"), roots=False))
    assert (await member_bus.call(TracedEcho.say, TracedText("x"))).text == "x"
    await asyncio.sleep(0)
    assert collector.tree() == set()


def test_without_the_variable_nothing_of_opentelemetry_is_imported() -> None:
    code = "import sys, kernelm_sdk.runner, kernelm_sdk.tracing as t\nt.parent()\n" \
           "print([m for m in sys.modules if 'opentelemetry' in m], t.bus_type().__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PATH": "/usr/bin"})
    assert done.stdout.strip() == "[] Bus"
