"""What every server asks of a call before it works on it: is it for the model that is served here, and is that young enough."""

import asyncio
import time
from collections.abc import Sequence
from typing import Protocol

from kernelm_contracts.server import GenerateRequest, ServedModel
from kernelm_sdk.errors import ClientFault
from kernelm_sdk.plugin import Call
from kernelm_sdk.serving import DEADLINE

TENANT = "Kernelm-Tenant"  # header of a door that calls for others


class OfModel(Protocol):
    """A request of a model's method."""

    @property
    def model(self) -> str: ...
    @property
    def at_least(self) -> int: ...


def require_served(served: ServedModel | None, request: OfModel, call: Call, pool: str) -> ServedModel:
    """What the instance serves, if it is what is asked for. ClientFault "unknown_model", or "stale_generation" (retriable)."""
    asked = call.model or request.model
    if served is None or (asked and asked != served.name):
        here = f"{served.name!r} is" if served else "this instance serves none"
        raise ClientFault("unknown_model", f"model {asked!r} is not served here; {here}",
                          "`kernelm model list` shows what is deployed")  # fmt: skip
    if served.generation < request.at_least:
        raise ClientFault("stale_generation", f"model {served.name!r} is at generation {served.generation} in pool {pool!r}, older "
                          f"than `at_least` {request.at_least}", "call again: the route may be on its way", retriable=True,
                          generation=served.generation, pool=pool)  # fmt: skip
    return served


def require_meaning(request: GenerateRequest, most_tokens: int) -> None:
    """ClientFault "invalid" that names the field whose value means nothing, or asks for more than `most_tokens` of one answer."""
    for wrong, what, remedy in (
        (bool(request.messages) == bool(request.prompt), "exactly one of `messages` and `prompt` must be given", "leave one out"),
        (not 0 <= request.max_tokens <= most_tokens, f"`max_tokens` is {request.max_tokens}", f"1 to {most_tokens}, or 0"),
        (not 0 <= request.temperature <= 100, f"`temperature` is {request.temperature}", "0 to 2 is usual"),
        (not 0 < request.top_p <= 1, f"`top_p` is {request.top_p}", "above 0, at most 1"),
        (request.top_k < 0, f"`top_k` is {request.top_k}", "1 or more, or 0 for all"),
        (not -2 <= request.presence_penalty <= 2, f"`presence_penalty` is {request.presence_penalty}", "-2 to 2"),
        (not -2 <= request.frequency_penalty <= 2, f"`frequency_penalty` is {request.frequency_penalty}", "-2 to 2"),
        (not all(request.stop), "`stop` holds an empty string", "leave it out"),
    ):
        if wrong:
            raise ClientFault("invalid", what, remedy)


def require_texts(texts: Sequence[str]) -> None:
    """ClientFault "invalid" that names the text in which there is nothing to read."""
    if not texts:
        raise ClientFault("invalid", "`input` is empty", "send at least one text")
    for row, text in enumerate(texts):
        if not text.strip():
            raise ClientFault("invalid", f"`input[{row}]` is blank", "leave it out")


def owner(call: Call) -> str:
    """For whom it is: what is remembered of one owner's prompts must not be noticed by another, not even by its speed. The caller
    is the broker's word; whom a door calls for is the door's, and tells its own callers apart and nobody else's."""
    return f"{call.caller}/{call.headers.get(TENANT, '')}"


def deadline(call: Call) -> float | None:
    """The caller's deadline in the event loop's time; None where it has none, or one that is past and hence a wrong clock."""
    left_s = float(call.headers.get(DEADLINE, 0)) - time.time()
    return asyncio.get_running_loop().time() + left_s if left_s > 0 else None


def ms_since(started: float) -> float:
    """Milliseconds since `started` of time.perf_counter()."""
    return round((time.perf_counter() - started) * 1e3, 3)
