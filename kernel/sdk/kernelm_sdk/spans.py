"""The spans of calls, streams, events and jobs; imported only where traces are asked for (tracing.py).

Source: OpenTelemetry semantic conventions for RPC (`rpc.*`) and for generative models (`gen_ai.*`). No span holds what was said: no
request, no answer, no fault's text.
"""

import contextlib
import functools
import os
import re
from collections.abc import AsyncIterator, Callable
from typing import Any

import msgspec
from opentelemetry import context as otel
from opentelemetry import trace
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import NonRecordingSpan, Span, SpanContext, SpanKind, TraceFlags
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from kernelm_sdk.bus import DEFAULT_TIMEOUT_S, Bus
from kernelm_sdk.contract import Method
from kernelm_sdk.events import Event
from kernelm_sdk.links import Credentials
from kernelm_sdk.otlp import Exporter, Record, Tracer
from kernelm_sdk.serving import Served
from kernelm_sdk.tracing import TRACEPARENT
from kernelm_sdk.usage import tokens

SYSTEM = "kernelm"
BATCHES = ("OTEL_BSP_MAX_QUEUE_SIZE", "OTEL_BSP_MAX_EXPORT_BATCH_SIZE")  # without these larger ones: a request costs 1.5 ms
TRACESTATE = "tracestate"
OURS = re.compile(r"00-([0-9a-f]{32})-([0-9a-f]{16})-(0[0-3])\Z")  # W3C Trace Context 2, version 00
propagator = TraceContextTextMapPropagator()
Attributes = dict[str, Any]


@functools.cache
def source(member: str) -> tuple[TracerProvider, Tracer]:
    """What the two functions below give."""
    resource = Resource.create({"service.name": os.environ.get("OTEL_SERVICE_NAME", member), "service.namespace": SYSTEM,
                                "service.instance.id": member})  # fmt: skip
    exporter, made = Exporter(), TracerProvider(resource=resource)
    queue, batch = (None, None) if any(name in os.environ for name in BATCHES) else (8192, 2048)
    exporter.provider, processor = made, BatchSpanProcessor(exporter, queue, max_export_batch_size=batch)
    made.add_span_processor(processor)
    if isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider):  # of several members in one process, the first one's
        trace.set_tracer_provider(made)  # for plugins with spans of their own
    return made, Tracer(made, processor)


def provider(member: str) -> TracerProvider:
    """What sends the spans of `member` in the background, and the rest at the end of the process."""
    return source(member)[0]


def tracer(member: str) -> Tracer:
    """The tracer of `member`, which is `service.name` unless OTEL_SERVICE_NAME is given."""
    return source(member)[1]


def injected(headers: dict[str, str] | None = None, of: Span | None = None) -> dict[str, str]:
    """`headers` with the context of the span `of`, the present one by default."""
    carrier, context = dict(headers or {}), (of or trace.get_current_span()).get_span_context()
    if context.is_valid:
        carrier[TRACEPARENT] = f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"
        if context.trace_state:
            carrier[TRACESTATE] = context.trace_state.to_header()
    return carrier


def extracted(headers: dict[str, str]) -> SpanContext:
    """The span that these headers name, or one that is not valid. What members write is read here, all else by the library."""
    found = OURS.match(headers.get(TRACEPARENT, ""))
    if found is None or TRACESTATE in headers:
        return trace.get_current_span(propagator.extract(headers, otel.Context())).get_span_context()
    number, span_id, flags = found.groups()
    return SpanContext(int(number, 16), int(span_id, 16), True, TraceFlags(int(flags, 16)))


def span(of: Tracer, name: str, kind: SpanKind, attributes: Attributes, parent: dict[str, str] | None = None,
         present: bool = True) -> Record:  # fmt: skip
    """A span around the block, below the present one or, with `parent`, below what those headers name. In the block it is the
    present one itself, unless the block is left and entered again (`present`). Of a fault it has the code alone."""
    above = trace.get_current_span().get_span_context() if parent is None else extracted(parent)
    opened = of.begin(name, kind, attributes, above)
    opened.present = present
    return opened


class TracedBus(Bus):
    """A bus whose calls, streams, events and handlers are spans, as far as they belong to a trace. Members begin none (`roots`):
    what they say every second to each other would bury all else."""

    roots = True
    _tracer: Tracer

    @classmethod
    async def connect(cls, url: str, credentials: Credentials, *, roots: bool = True, **options: Any) -> "Bus":
        bus = await super().connect(url, credentials, **options)
        assert isinstance(bus, cls)
        bus.roots, bus._tracer = roots, tracer(bus.user)
        return bus

    def _apart(self) -> bool:
        """Whether what is done now belongs to no trace."""
        return not self.roots and not trace.get_current_span().get_span_context().is_valid

    async def call(self, declared: Any, request: msgspec.Struct, *, model: str = "", instance: str = "",
                   timeout_s: float = DEFAULT_TIMEOUT_S, patience_s: float = 0.0,
                   headers: dict[str, str] | None = None) -> Any:  # fmt: skip
        method, _ = self.resolve(declared)
        given = {"model": model, "instance": instance, "timeout_s": timeout_s, "patience_s": patience_s}
        if self._apart():
            return await super().call(declared, request, headers=headers, **given)  # type: ignore[arg-type]
        with span(self._tracer, _name(method), SpanKind.CLIENT, about(method, model, instance)) as opened:
            reply = await super().call(declared, request, headers=injected(headers), **given)  # type: ignore[arg-type]
            opened.set_attributes(answered(method, reply))
            return reply

    async def stream(self, declared: Any, request: msgspec.Struct, *, model: str = "", instance: str = "",
                     idle_s: float = DEFAULT_TIMEOUT_S, headers: dict[str, str] | None = None) -> AsyncIterator[Any]:  # fmt: skip
        method, _ = self.resolve(declared)
        given = {"model": model, "instance": instance, "idle_s": idle_s}
        if self._apart():
            async with contextlib.aclosing(super().stream(declared, request, headers=headers, **given)) as plain:  # type: ignore
                async for frame in plain:
                    yield frame
            return
        with span(self._tracer, _name(method), SpanKind.CLIENT, about(method, model, instance), present=False) as opened:
            frames = super().stream(declared, request, headers=injected(headers, opened), **given)  # type: ignore[arg-type]
            async with contextlib.aclosing(_noting(opened, method, frames)) as noting:  # type: ignore[type-var]
                async for frame in noting:
                    yield frame

    async def publish(self, event: Event, patience_s: float = 30.0) -> int:
        if self._apart():
            return await super().publish(event, patience_s)
        with span(self._tracer, f"publish {event.TYPE}", SpanKind.PRODUCER, {"messaging.destination.name": event.TYPE}):
            return await super().publish(event, patience_s)

    async def serve(self, handlers: dict[str, tuple[Method, Callable[..., Any]]], **options: Any) -> Served:
        return await super().serve({k: (m, self._traced(m, h)) for k, (m, h) in handlers.items()}, **options)

    def _traced(self, method: Method, handler: Callable[..., Any]) -> Callable[..., Any]:
        async def streamed(request: Any, call: Any) -> AsyncIterator[Any]:
            if TRACEPARENT not in call.headers:
                async with contextlib.aclosing(handler(request, call)) as plain:
                    async for frame in plain:
                        yield frame
                return
            with span(self._tracer, _name(method), SpanKind.SERVER, about(method, call.model), call.headers) as opened:
                async with contextlib.aclosing(_noting(opened, method, handler(request, call))) as noting:  # type: ignore[type-var]
                    async for frame in noting:
                        yield frame

        async def unary(request: Any, call: Any) -> Any:
            headers = call.headers if method.kind != "job" else {TRACEPARENT: request.trace} if request.trace else {}
            if TRACEPARENT not in headers:
                return await handler(request, call)
            with span(self._tracer, _name(method), SpanKind.SERVER, about(method, call.model), headers) as opened:
                reply = await handler(request, call)
                opened.set_attributes(answered(method, reply))
                return reply

        return streamed if method.kind == "streamed" else unary


def traced_job(method: Method, handler: Callable[..., Any]) -> Callable[..., Any]:
    """The work on a job, below the span in which it was handed over."""

    async def work(request: Any, job: Any) -> Any:
        if job.context.bus._apart():
            return await handler(request, job)
        attributes = {**about(method), "kernelm.job.id": job.id, "kernelm.job.epoch": job.epoch, "kernelm.job.attempt": job.attempt}
        with span(job.context.bus._tracer, f"work {method.contract.id()}.{method.name}", SpanKind.INTERNAL, attributes):
            return await handler(request, job)

    return work


def go_on(traceparent: str) -> None:
    """What the present task does from now on belongs to that trace."""
    otel.attach(trace.set_span_in_context(NonRecordingSpan(extracted({TRACEPARENT: traceparent}))))


def door_span(bus: Any, method: Method, model: str) -> Record:
    """The span of a call at a door, see `tracing.door`."""
    return span(bus._tracer, f"{_name(method)} {model}".rstrip(), SpanKind.SERVER, about(method, model))


def about(method: Method, model: str = "", instance: str = "") -> Attributes:
    """What a span says of a call."""
    attributes = {"rpc.system.name": SYSTEM, "rpc.method": _name(method)}
    if model:
        attributes |= {"gen_ai.provider.name": SYSTEM, "gen_ai.operation.name": method.name, "gen_ai.request.model": model}
    if instance:
        attributes["server.address"] = instance
    return attributes


def answered(method: Method, reply: Any) -> Attributes:
    """What it says of the answer: which model of which generation, and how many tokens."""
    if method.scope != "model":
        return {}
    read, made = tokens(reply)
    found = {
        "gen_ai.response.model": getattr(reply, "model", ""), "kernelm.model.generation": getattr(reply, "generation", 0),
        "gen_ai.usage.input_tokens": read, "gen_ai.usage.output_tokens": made,
    }  # fmt: skip
    return {name: value for name, value in found.items() if value}


async def _noting(opened: Record, method: Method, frames: AsyncIterator[Any]) -> AsyncIterator[Any]:
    """The frames; the first is an event of the span, and the last says what it cost."""
    frame = None
    try:
        async with contextlib.aclosing(frames) as frames:  # type: ignore[type-var]
            async for frame in frames:
                if not opened.events:
                    opened.add_event("first frame")
                yield frame
    finally:
        opened.set_attributes(answered(method, frame))


def _name(method: Method) -> str:
    return f"{method.contract.id()}/{method.name}"
