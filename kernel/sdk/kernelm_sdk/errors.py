"""Faults: what went wrong, why, and what to do about it.

Every failure that crosses a boundary is a `Fault`. Its class says whose fault it was (after h11's local and remote errors):
the caller's (`ClientFault`), the plugin's (`PluginFault`) or the system's (`KernelFault`). `retriable` says whether the same
call may succeed later without a change. On the wire a fault is a `FaultBody` beside the headers of NATS micro (ADR-32),
so that the stock `nats` tool shows it too.
"""

from typing import Any, ClassVar, Literal

import msgspec

Whose = Literal["client", "plugin", "kernel"]


class FaultBody(msgspec.Struct, frozen=True, omit_defaults=True):
    """A fault as it travels: the body of a reply whose `Nats-Service-Error-Code` header is set."""

    whose: Whose
    code: str  # a stable token for programs: "unknown_model", "stale_epoch"
    message: str  # what was wrong, with the name of the file or field
    remedy: str = ""  # what the reader can do about it
    retriable: bool = False
    details: dict[str, Any] = {}


class Fault(Exception):
    """Base of all faults: `code`, `message`, `remedy`, `retriable` and free `details`."""

    whose: ClassVar[Whose] = "kernel"
    status: ClassVar[int] = 500  # the class in HTTP terms; a code of its own is in STATUS
    loading = False  # a plugin raised it while it loaded, and its machine is not to blame (endings.py)

    def __init__(self, code: str, message: str, remedy: str = "", *, retriable: bool = False, **details: Any) -> None:
        super().__init__(message)
        self.code, self.message, self.remedy, self.retriable, self.details = code, message, remedy, retriable, details

    def __str__(self) -> str:
        return f"{self.message} ({self.code})" + (f"\n  remedy: {self.remedy}" if self.remedy else "")

    @property
    def http_status(self) -> int:
        """The HTTP status a gateway answers with."""
        return STATUS.get(self.code, self.status)

    def body(self) -> FaultBody:
        """The fault as a struct for the wire."""
        return FaultBody(self.whose, self.code, self.message, self.remedy, self.retriable, self.details)

    def __reduce__(self) -> tuple[Any, ...]:
        """What a worker process raises arrives in its parent as it was: an exception is pickled as its class and its message."""
        return from_body, (self.body(),)


class ClientFault(Fault):
    """The caller asked for something that can't be had; asking again changes nothing unless `retriable`."""

    whose, status = "client", 400


class PluginFault(Fault):
    """A plugin failed at what it had promised."""

    whose, status = "plugin", 502


class KernelFault(Fault):
    """The system could not do its part: broker, routing, storage, supervision."""

    whose, status = "kernel", 503


STATUS = {
    "unauthorized": 401, "permission_denied": 403, "unknown_model": 404, "not_found": 404, "conflict": 409,
    "stale_generation": 409, "stale_epoch": 409, "already_exists": 409, "too_large": 413, "busy": 429, "budget_spent": 429,
    "rate_limited": 429, "not_ready": 503, "no_responders": 503, "timeout": 504, "unsupported_method": 501,
}  # fmt: skip

_CLASSES: dict[str, type[Fault]] = {"client": ClientFault, "plugin": PluginFault, "kernel": KernelFault}


def from_body(body: FaultBody) -> Fault:
    """The exception for a fault that arrived over the wire."""
    return _CLASSES[body.whose](body.code, body.message, body.remedy, retriable=body.retriable, **body.details)


def invalid(what: str, error: Exception, remedy: str = "") -> ClientFault:
    """The fault for input that failed validation; `what` names the file or message, msgspec's text names the field."""
    return ClientFault("invalid", f"{what}: {error}", remedy)
