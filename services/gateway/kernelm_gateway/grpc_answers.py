"""What all gRPC calls have in common: what a call says beside its request, and how it ends when it does not end well, a fault as
a rich status in the trailers."""

import logging
from collections.abc import Callable
from typing import Any

from grpc_status import rpc_status

from kernelm_gateway import faults
from kernelm_sdk.errors import Fault

log = logging.getLogger("kernelm.gateway")


def metadata(context: Any) -> Callable[[str], str]:
    """What the metadata of a call say under a name, "" for nothing. Binary ones ("...-bin") are none of ours."""
    said = {name: value for name, value in context.invocation_metadata() or () if isinstance(value, str)}
    return lambda name: said.get(name, "")


def status_of(error: Exception, what: str) -> Any:
    """The status for `error`; the text of one that is no fault stays in the log."""
    if not isinstance(error, Fault):
        log.exception("%s failed over gRPC", what, exc_info=error)
        error = faults.of_bug()
    return faults.grpc_status(error)


async def refuse(context: Any, status: Any) -> Any:
    """End the call with a rich status: code, message and details in the trailers."""
    rich = rpc_status.to_status(status)
    await context.abort(rich.code, rich.details, rich.trailing_metadata)
