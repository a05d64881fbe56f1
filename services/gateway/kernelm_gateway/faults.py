"""Faults as HTTP and gRPC clients see them. What a fault says to people is the same everywhere: message and remedy.

Sources: OpenAI API reference, "Error codes" (the form `{"error": {...}}`); RFC 9110, 15.5 and 10.2.3 (Retry-After);
grpc.io, "Status codes" and "Richer error model"; google.aip.dev/193 (`ErrorInfo`).
"""

from typing import Any

import msgspec
from google.protobuf import duration_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2

from kernelm_gateway.loading import LoadingProgress
from kernelm_sdk.errors import Fault, KernelFault

RETRY_S = 1  # when nobody knows better
LONGEST = 1000  # characters of a text in gRPC's trailers, which clients limit to 8 KB in all
DOMAIN = "kernelm"
TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error", 501: "invalid_request_error"}
CLIENTS = {"timeout": 408, "method_not_allowed": 405}  # HTTP's own, where it is the client who is late or mistaken
CODES = {
    "unauthorized": code_pb2.UNAUTHENTICATED, "permission_denied": code_pb2.PERMISSION_DENIED,
    "unknown_model": code_pb2.NOT_FOUND, "not_found": code_pb2.NOT_FOUND, "already_exists": code_pb2.ALREADY_EXISTS,
    "conflict": code_pb2.ABORTED, "stale_epoch": code_pb2.ABORTED, "stale_generation": code_pb2.FAILED_PRECONDITION,
    "too_large": code_pb2.RESOURCE_EXHAUSTED, "busy": code_pb2.RESOURCE_EXHAUSTED, "timeout": code_pb2.DEADLINE_EXCEEDED,
    "not_ready": code_pb2.UNAVAILABLE, "no_responders": code_pb2.UNAVAILABLE, "unsupported_method": code_pb2.UNIMPLEMENTED,
}  # fmt: skip


class ErrorDetail(msgspec.Struct, frozen=True):
    """OpenAI's fields, then kernelm's own."""

    message: str
    type: str  # "invalid_request_error", "authentication_error", "permission_error", "rate_limit_error", "server_error"
    code: str  # a stable token for programs: "unknown_model"
    param: str | None  # the field of the request that is at fault
    remedy: str
    whose: str  # "client", "plugin", "kernel": whose fault it is
    retriable: bool
    progress: LoadingProgress | msgspec.UnsetType = msgspec.UNSET  # of a model that does not answer yet


class ErrorBody(msgspec.Struct, frozen=True):
    error: ErrorDetail


def of_bug() -> KernelFault:
    """What the caller is told of an exception that should not have been: no text of it, since it may hold secrets."""
    return KernelFault("internal", "the gateway failed at this request", "see the gateway's log")


def http_status(fault: Fault) -> int:
    if fault.whose == "client" and fault.code in CLIENTS:
        return CLIENTS[fault.code]
    return 500 if fault.code == "internal" and fault.whose == "kernel" else fault.http_status


def http_body(fault: Fault) -> ErrorBody:
    """The body of the answer."""
    status = http_status(fault)
    kind = TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    param = fault.details.get("param")
    progress = fault.details.get("progress")
    return ErrorBody(ErrorDetail(fault.message, kind, fault.code, str(param) if param else None, fault.remedy, fault.whose,
                                 fault.retriable, msgspec.convert(progress, LoadingProgress) if progress else msgspec.UNSET))


def http_headers(fault: Fault) -> dict[str, str]:
    """`Retry-After` for 429 and 503, `WWW-Authenticate` for 401."""
    status = http_status(fault)
    if status in (429, 503):
        return {"Retry-After": str(_retry_s(fault))}
    return {"WWW-Authenticate": "Bearer"} if status == 401 else {}


def grpc_status(fault: Fault) -> status_pb2.Status:
    """The rich status: `ErrorInfo` with code, whose and remedy, and `RetryInfo` if the call may be tried again."""
    info = error_details_pb2.ErrorInfo(reason=fault.code.upper(), domain=DOMAIN, metadata={
        "code": fault.code, "whose": fault.whose, "remedy": fault.remedy[:LONGEST]})  # fmt: skip
    status = status_pb2.Status(code=_grpc_code(fault), message=fault.message[:LONGEST])
    status.details.add().Pack(info)
    if fault.retriable:
        delay = duration_pb2.Duration(seconds=_retry_s(fault))
        status.details.add().Pack(error_details_pb2.RetryInfo(retry_delay=delay))
    return status


def _grpc_code(fault: Fault) -> Any:
    if fault.code in CODES:
        return CODES[fault.code]
    if fault.whose == "client":
        return code_pb2.INVALID_ARGUMENT
    return code_pb2.UNAVAILABLE if fault.retriable else code_pb2.INTERNAL


def _retry_s(fault: Fault) -> int:
    """Whole seconds: what the fault says, else RETRY_S."""
    wish = fault.details.get("retry_after_s")
    return max(1, round(wish)) if isinstance(wish, int | float) else RETRY_S
