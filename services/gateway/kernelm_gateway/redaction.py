"""Private data is taken out of what a model reads and says, where caller or policy ask for it, by the data plugin's detector.

`Kernelm-Redact: prompt`, `answer` or `both`, as a header over HTTP and as metadata over gRPC, asks for one call; `[private]` in
gateway.toml for all calls of a tenant. When the detector does not answer, the call is refused: nothing goes through unread.
"""

from collections.abc import AsyncIterator
from contextlib import aclosing
from contextvars import ContextVar
from typing import Any

from msgspec.structs import replace

from kernelm_contracts.data import Data, RedactedPart, RedactPart, RedactRequest, RedactState
from kernelm_contracts.retriever import (
    AnswerFrame,
    AnswerRequest,
    RecommendReply,
    RecommendRequest,
    SearchReply,
    SearchRequest,
    Source,
)
from kernelm_contracts.server import ClassifyRequest, EmbedRequest, ExtractRequest, GenerateFrame, GenerateRequest, InfoRequest
from kernelm_sdk.errors import ClientFault

HEADER = "kernelm-redact"
PARTS = {"": frozenset[str](), "prompt": frozenset({"prompt"}), "answer": frozenset({"answer"}),
         "both": frozenset({"prompt", "answer"})}  # fmt: skip
ASKED = {SearchRequest: "query", RecommendRequest: "text", AnswerRequest: "question"}  # where the text of such a request is
_asked: ContextVar[str] = ContextVar("redact", default="")


def arrived(header: str) -> None:
    """What the request that this task is about asks for. ClientFault "invalid"."""
    if header.lower() not in PARTS:
        known = ", ".join(filter(None, PARTS))
        raise ClientFault("invalid", f"{HEADER}: {header[:40]!r} is not known", f"one of {known}", param=HEADER)
    if header:
        _asked.set(header.lower())


class Redaction:
    """`tenants`: tenant -> parts that are always redacted; "*" for those without an entry. `bus`: what has `call`."""

    def __init__(self, bus: Any, tenants: dict[str, str]) -> None:
        self._bus, self._tenants = bus, tenants

    def wanted(self, tenant: str) -> frozenset[str]:
        """What is to be redacted in the present call of a tenant."""
        return PARTS[_asked.get()] | PARTS[self._tenants.get(tenant, self._tenants.get("*", ""))]

    async def request(self, request: Any) -> Any:
        """The request of a model without private data."""
        if isinstance(request, GenerateRequest):
            texts = (request.prompt, *(message.content for message in request.messages))
            prompt, *contents = await self._texts(texts)
            messages = tuple(replace(m, content=c) for m, c in zip(request.messages, contents, strict=True))
            return replace(request, prompt=prompt, messages=messages)
        if isinstance(request, ClassifyRequest | EmbedRequest | ExtractRequest):
            return replace(request, input=await self._texts(request.input))
        if field := ASKED.get(type(request)):
            (text,) = await self._texts((getattr(request, field),))
            return replace(request, **{field: text})
        if isinstance(request, InfoRequest):  # it has no text
            return request
        what = f"{HEADER}: {type(request).__name__} has nothing that could be redacted"
        raise ClientFault("invalid", what, "leave it out", param=HEADER)

    async def reply(self, reply: Any) -> Any:
        """A whole answer of a model without private data."""
        if isinstance(reply, SearchReply | RecommendReply):
            return replace(reply, sources=await self._sources(reply.sources))
        return reply

    async def _sources(self, sources: tuple[Source, ...]) -> tuple[Source, ...]:
        texts = await self._texts(tuple(text for source in sources for text in (source.title, source.passage)))
        pairs = zip(texts[::2], texts[1::2], strict=True)
        return tuple(replace(source, title=title, passage=passage) for source, (title, passage) in zip(sources, pairs, strict=True))

    async def frames(self, frames: AsyncIterator[Any]) -> AsyncIterator[Any]:
        """The frames of an answer without private data; a piece may come later than it was said."""
        state = RedactState()
        async with aclosing(frames) as frames:  # type: ignore[type-var]
            async for frame in frames:
                if not isinstance(frame, GenerateFrame | AnswerFrame):
                    yield frame
                    continue
                if isinstance(frame, AnswerFrame) and frame.sources:
                    frame = replace(frame, sources=await self._sources(frame.sources))
                last = bool(frame.finish_reason)
                if not frame.text and not last:
                    yield frame
                    continue
                part: RedactedPart = await self._bus.call(Data.redact_part, RedactPart(frame.text, state, last))
                state = part.state
                frame = replace(frame, text=part.text)
                if isinstance(frame, GenerateFrame) and frame.tool_calls:
                    calls = frame.tool_calls
                    arguments = await self._texts(tuple(call.arguments for call in calls))
                    calls = tuple(replace(call, arguments=text) for call, text in zip(calls, arguments, strict=True))
                    frame = replace(frame, tool_calls=calls)
                yield frame

    async def _texts(self, texts: tuple[str, ...]) -> tuple[str, ...]:
        if not any(texts):
            return texts
        redacted = await self._bus.call(Data.redact, RedactRequest(texts))
        found: tuple[str, ...] = redacted.texts
        return found
