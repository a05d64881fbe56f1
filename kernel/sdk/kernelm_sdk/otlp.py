"""Spans as plain records, and their way into OTLP's messages; imported only where traces are asked for (tracing.py).

A span of the SDK costs 25 us of processor time to make and 45 to encode: locks, checked copies of each attribute, a message of
protobuf for each. These cost a tenth. All else is the SDK's: resource, sampler, ids, batches, HTTP with its variables and retries.
Sources: OTLP 1.5, `opentelemetry/proto/trace/v1/trace.proto`; protobuf.dev, "Encoding" (fields of a message that come one after
another in any order, and again, make one message).
"""

import contextlib
import functools
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from opentelemetry import context as otel
from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, ArrayValue, InstrumentationScope, KeyValue, KeyValueList
from opentelemetry.proto.resource.v1.resource_pb2 import Resource as ResourceMessage
from opentelemetry.proto.trace.v1 import trace_pb2 as otlp
from opentelemetry.sdk.trace import Event, ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import SpanExportResult
from opentelemetry.sdk.trace.sampling import DEFAULT_ON, Decision
from opentelemetry.sdk.util.instrumentation import InstrumentationScope as Scope
from opentelemetry.trace import Link, SpanContext, SpanKind, Status, StatusCode, TraceFlags

from kernelm_sdk.errors import Fault

SCOPE = "kernelm_sdk"  # the instrumentation scope of all these spans
KINDS = {kind: getattr(otlp.Span, f"SPAN_KIND_{kind.name}") for kind in SpanKind}
STATUSES = {code: getattr(otlp.Status, f"STATUS_CODE_{code.name}") for code in StatusCode}
RESOURCE_SPANS, SCOPE_SPANS, SPANS = (message.DESCRIPTOR.fields_by_name[name].number << 3 | 2 for message, name in (
    (ExportTraceServiceRequest, "resource_spans"), (otlp.ResourceSpans, "scope_spans"), (otlp.ScopeSpans, "spans")))  # fmt: skip
SLICE = 64  # spans that are encoded without a pause, in some 0.3 ms
PLAIN = (str, int, float, bool)
LOCAL = otlp.SPAN_FLAGS_CONTEXT_HAS_IS_REMOTE_MASK  # flags: whether the parent is of another process is known, and it is not
REMOTE = LOCAL | otlp.SPAN_FLAGS_CONTEXT_IS_REMOTE_MASK
Attributes = Mapping[str, Any]


class Record(trace.Span):
    """A span. As a context manager it ends with the block, and is the present one in it unless told otherwise (`present`); of a
    fault it has the code alone."""

    present = True
    end_time = 0  # Unix nanoseconds; 0 while it goes on
    error = ""
    status = StatusCode.UNSET
    events: tuple[tuple[str, int, Attributes], ...] = ()
    _token: Any = None

    def __init__(self, processor: SpanProcessor | None, name: str, context: SpanContext, parent: SpanContext | None, kind: SpanKind,
                 attributes: Attributes | None, links: Sequence[Link] = ()) -> None:  # fmt: skip
        self._processor = processor  # None: it is not recorded
        self.name, self.context, self.parent, self.kind, self.links = name, context, parent, kind, links
        self.attributes: dict[str, Any] = dict(attributes) if attributes else {}
        self.start_time = time.time_ns()

    def __enter__(self) -> "Record":
        if self.present:
            self._token = otel.attach(trace.set_span_in_context(self))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace_back: Any) -> None:
        if isinstance(error, Exception):
            code = error.code if isinstance(error, Fault) else type(error).__name__
            self.attributes["error.type"] = code
            self.set_status(StatusCode.ERROR, code)
        if self._token is not None:
            otel.detach(self._token)
        self.end()

    def get_span_context(self) -> SpanContext:
        return self.context

    def is_recording(self) -> bool:
        return self._processor is not None and not self.end_time

    def set_attributes(self, attributes: Attributes) -> None:
        if not self.end_time:
            self.attributes.update(attributes)

    def set_attribute(self, key: str, value: Any) -> None:
        self.set_attributes({key: value})

    def add_event(self, name: str, attributes: Attributes | None = None, timestamp: int | None = None) -> None:
        if not self.end_time:
            self.events += ((name, timestamp or time.time_ns(), attributes or {}),)

    def add_link(self, context: SpanContext, attributes: Attributes | None = None) -> None:
        if not self.end_time:
            self.links = (*self.links, Link(context, attributes))

    def update_name(self, name: str) -> None:
        self.name = name

    def set_status(self, status: Status | StatusCode, description: str | None = None) -> None:
        given = status if isinstance(status, Status) else Status(status, description)
        if not self.end_time and self.status is not StatusCode.OK:  # which is final
            self.status, self.error = given.status_code, given.description or ""

    def record_exception(self, exception: BaseException, attributes: Attributes | None = None, timestamp: int | None = None,
                         escaped: bool = False) -> None:  # fmt: skip
        said = {"exception.type": type(exception).__qualname__, "exception.message": str(exception),
                "exception.stacktrace": "".join(traceback.format_exception(exception))}  # fmt: skip
        self.add_event("exception", {**said, **(attributes or {})}, timestamp)

    def end(self, end_time: int | None = None) -> None:
        if self.end_time:
            return
        self.end_time = end_time or time.time_ns()
        if self._processor is not None:
            self._processor.on_end(self)  # type: ignore[arg-type]  # the batch reads `context` alone

    def readable(self, provider: TracerProvider) -> ReadableSpan:
        """The same as the SDK has it."""
        events = tuple(Event(name, attributes, timestamp) for name, timestamp, attributes in self.events)
        return ReadableSpan(self.name, self.context, self.parent, provider.resource, self.attributes, events, self.links, self.kind,
                            None, Status(self.status, self.error or None), self.start_time, self.end_time,
                            Scope(SCOPE))  # fmt: skip


class Tracer(trace.Tracer):
    """Begins records, as the sampler of `provider` decides, which `processor` gets when they end."""

    def __init__(self, provider: TracerProvider, processor: SpanProcessor) -> None:
        self._sampler, self._ids, self._processor = provider.sampler, provider.id_generator, processor

    def begin(self, name: str, kind: SpanKind, attributes: Attributes | None, parent: SpanContext,
              links: Sequence[Link] = ()) -> Record:  # fmt: skip
        """A span below `parent`, or a root where that is not valid."""
        above = parent if parent.is_valid else None
        number = self._ids.generate_trace_id() if above is None else above.trace_id
        flags = 0 if above is None else above.trace_flags
        state, decision = parent.trace_state, Decision.DROP
        if self._sampler is not DEFAULT_ON:
            below = trace.set_span_in_context(trace.NonRecordingSpan(parent))
            result = self._sampler.should_sample(below, number, name, kind, attributes, links)
            state, decision, attributes = result.trace_state or state, result.decision, result.attributes or attributes
        elif above is None or flags & TraceFlags.SAMPLED:  # the same answer, without the question
            decision = Decision.RECORD_AND_SAMPLE
        flags = flags & ~TraceFlags.SAMPLED | (TraceFlags.SAMPLED if decision is Decision.RECORD_AND_SAMPLE else 0)
        context = SpanContext(number, self._ids.generate_span_id(), False, TraceFlags(flags), state)
        return Record(None if decision is Decision.DROP else self._processor, name, context, above, kind, attributes, links)

    def start_span(self, name: str, context: otel.Context | None = None, kind: SpanKind = SpanKind.INTERNAL,
                   attributes: Attributes | None = None, links: Sequence[Link] | None = None, start_time: int | None = None,
                   record_exception: bool = True, set_status_on_exception: bool = True) -> Record:  # fmt: skip
        """As OpenTelemetry has it."""
        record = self.begin(name, kind, attributes, trace.get_current_span(context).get_span_context(), links or ())
        record.start_time = start_time or record.start_time
        return record

    @contextlib.contextmanager
    def start_as_current_span(self, name: str, *given: Any, end_on_exit: bool = True, **more: Any) -> Iterator[Record]:  # type: ignore
        with trace.use_span(self.start_span(name, *given, **more), end_on_exit) as span:
            assert isinstance(span, Record)
            yield span


class Exporter(OTLPSpanExporter):
    """Sends records; spans of the SDK, which a plugin may make, go as they always did."""

    provider: TracerProvider  # whose resource they are of

    def export(self, spans: Sequence[Any]) -> SpanExportResult:
        records = [span for span in spans if isinstance(span, Record)]
        others = [span for span in spans if not isinstance(span, Record)]
        send = getattr(getattr(self, "_client", None), "export", None)  # since 1.45; it is not of the SDK's public interface
        if send is None:
            return super().export([*others, *(record.readable(self.provider) for record in records)])
        results = [send(request(self.provider, records)).success] if records else []
        if others:
            results.append(super().export(others) is SpanExportResult.SUCCESS)
        return SpanExportResult.SUCCESS if all(results) else SpanExportResult.FAILURE


def request(provider: TracerProvider, records: Sequence[Record]) -> bytes:
    """An ExportTraceServiceRequest."""
    scope = [otlp.ScopeSpans(scope=InstrumentationScope(name=SCOPE)).SerializeToString()]
    for at in range(0, len(records), SLICE):
        time.sleep(0)  # lets other threads in, whom the interpreter would make wait for 5 ms
        scope += [_field(SPANS, encoded(record)) for record in records[at : at + SLICE]]
    resource = otlp.ResourceSpans(resource=ResourceMessage(attributes=_key_values(provider.resource.attributes)))
    return _field(RESOURCE_SPANS, resource.SerializeToString() + _field(SCOPE_SPANS, b"".join(scope)))


def encoded(record: Record) -> bytes:
    """A Span of OTLP."""
    context, parent = record.context, record.parent
    message = otlp.Span(trace_id=context.trace_id.to_bytes(16, "big"), span_id=context.span_id.to_bytes(8, "big"),
                        parent_span_id=parent.span_id.to_bytes(8, "big") if parent is not None else b"", name=record.name,
                        kind=KINDS[record.kind], flags=_flags(parent),
                        start_time_unix_nano=record.start_time, end_time_unix_nano=record.end_time)  # fmt: skip
    if context.trace_state:
        message.trace_state = context.trace_state.to_header()
    if record.status is not StatusCode.UNSET:
        message.status.MergeFrom(otlp.Status(code=STATUSES[record.status], message=record.error))
    for name, timestamp, attributes in record.events:
        message.events.add(name=name, time_unix_nano=timestamp, attributes=_key_values(attributes))
    for link in record.links:
        message.links.add(trace_id=link.context.trace_id.to_bytes(16, "big"), span_id=link.context.span_id.to_bytes(8, "big"),
                          attributes=_key_values(link.attributes or {}), flags=_flags(link.context))  # fmt: skip
    parts = [message.SerializeToString()]
    parts += [_known(key, value) if type(value) in PLAIN else _made(key, value) for key, value in record.attributes.items()]
    return b"".join(parts)


def _flags(parent: SpanContext | None) -> int:
    return REMOTE if parent is not None and parent.is_remote else LOCAL


def _made(key: str, value: Any) -> bytes:
    """An attribute as part of a span."""
    made: bytes = otlp.Span(attributes=_key_values({key: value})).SerializeToString()
    return made


_known = functools.lru_cache(4096, typed=True)(_made)  # typed: True is not 1


def _key_values(attributes: Attributes) -> list[KeyValue]:
    return [KeyValue(key=key, value=_any(value)) for key, value in attributes.items()]


def _any(value: Any) -> AnyValue:
    match value:
        case None:
            return AnyValue()
        case bool():
            return AnyValue(bool_value=value)
        case int() if -(2**63) <= value < 2**63:
            return AnyValue(int_value=value)
        case float():
            return AnyValue(double_value=value)
        case bytes():
            return AnyValue(bytes_value=value)
        case Mapping():
            return AnyValue(kvlist_value=KeyValueList(values=_key_values({str(k): v for k, v in value.items()})))
        case Sequence() if not isinstance(value, str):
            return AnyValue(array_value=ArrayValue(values=map(_any, value)))
        case _:
            return AnyValue(string_value=str(value))


def _field(tag: int, body: bytes) -> bytes:
    """A message as a field of another: tag, length in groups of seven bits, bytes."""
    head, size = [tag], len(body)
    while size > 127:
        head.append(size & 127 | 128)
        size >>= 7
    return bytes((*head, size)) + body
