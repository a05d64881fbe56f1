"""Traces, where they are asked for: a call is one tree of spans from its caller through the broker to the handler and on.

OpenTelemetry's own variables ask for them: OTEL_EXPORTER_OTLP_ENDPOINT (or ..._TRACES_ENDPOINT) says where spans go,
OTEL_TRACES_SAMPLER and the others which. Without these nothing of OpenTelemetry is imported, and a call costs what it did. The
context travels in the header `traceparent` (W3C Trace Context), and with a job on its record.
"""

import functools
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from kernelm_sdk.bus import Bus
from kernelm_sdk.errors import ClientFault
from kernelm_sdk.links import Credentials

if TYPE_CHECKING:
    from kernelm_sdk.contract import Method

ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
TRACEPARENT = "traceparent"


@functools.cache
def asked_for() -> bool:
    """Whether this process is to send traces; asked at every call, so the environment is read once."""
    return os.environ.get("OTEL_SDK_DISABLED", "").lower() != "true" and any(os.environ.get(name) for name in ENDPOINTS)


def bus_type() -> type[Bus]:
    """The bus of this process: one that traces where that is asked for. ClientFault "invalid" if it can't."""
    if not asked_for():
        return Bus
    try:
        from kernelm_sdk.spans import TracedBus
    except ImportError as error:
        raise ClientFault("invalid", f"OTEL_EXPORTER_OTLP_ENDPOINT asks for traces: {error}",
                          "pip install 'kernelm-sdk[tracing]', or leave the variable out") from None  # fmt: skip
    return TracedBus


async def connect(url: str, credentials: Credentials, **options: Any) -> Bus:
    """As `Bus.connect`, with traces where they are asked for."""
    return await bus_type().connect(url, credentials, **options)


async def join_as_member(url: str, credentials: Credentials) -> Bus:
    """As `connect`, for a member of the system: it goes on with the traces of others, and begins none."""
    kind = bus_type()
    return await (kind.connect(url, credentials) if kind is Bus else kind.connect(url, credentials, roots=False))  # type: ignore


def job(method: "Method", handler: Callable[..., Any]) -> Callable[..., Any]:
    """The handler of a job, whose work is a span where traces are asked for."""
    if not asked_for():
        return handler
    from kernelm_sdk.spans import traced_job

    return traced_job(method, handler)


def arrived(traceparent: str) -> None:
    """What this task does from now on is done for a caller from outside, who sent this header ("" for none)."""
    if traceparent and asked_for():
        from kernelm_sdk.spans import go_on

        go_on(traceparent)


def door(bus: Bus, method: "Method", model: str = "") -> AbstractContextManager[Any]:
    """Around what a door does for a caller from outside: a span below the caller's, or the root of a trace."""
    if not asked_for():
        return nullcontext()
    from kernelm_sdk.spans import door_span

    return door_span(bus, method, model)


def parent() -> str:
    """The `traceparent` of what is being done now; "" where nothing is traced."""
    if not asked_for():
        return ""
    from kernelm_sdk.spans import injected

    return injected().get(TRACEPARENT, "")
