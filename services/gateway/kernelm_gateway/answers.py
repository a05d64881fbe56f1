"""What OpenAI's clients get back: the frames of `server/1.generate` as one object, or as chunks that are sent as events.

Source: OpenAI API reference, "The chat completion object", "The chat completion chunk object", "The completion object".
"""

import secrets
import time
from typing import Literal

import msgspec
from msgspec import UNSET, Struct, UnsetType

from kernelm_contracts.server import GenerateFrame, ToolCall
from kernelm_gateway.completions import FunctionCall
from kernelm_sdk.errors import PluginFault

encode = msgspec.json.Encoder().encode
Reason = Literal["stop", "length", "tool_calls"] | None
DONE = b"data: [DONE]\n\n"
PLACE = secrets.token_hex(16)  # of a text in an event: stands for no name of a model


class CachedTokens(Struct, frozen=True):
    cached_tokens: int  # of the prompt: those that did not have to be computed again


class TokenUsage(Struct, frozen=True):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class CalledTool(Struct, frozen=True):
    id: str
    function: FunctionCall
    type: Literal["function"] = "function"
    index: int | UnsetType = UNSET  # in chunks


class AssistantMessage(Struct, frozen=True):
    content: str | None  # null where there are calls and no text
    role: Literal["assistant"] = "assistant"
    tool_calls: list[CalledTool] | UnsetType = UNSET
    refusal: None = None


class ChatChoice(Struct, frozen=True):
    message: AssistantMessage
    finish_reason: Reason
    index: int = 0
    logprobs: None = None


class ChatCompletion(Struct, frozen=True):
    """OpenAI's answer, and which generation and artifact gave it."""

    id: str
    created: int  # Unix seconds
    model: str
    choices: list[ChatChoice]
    usage: TokenUsage
    generation: int
    artifact: str  # digest
    object: Literal["chat.completion"] = "chat.completion"


class Delta(Struct, frozen=True):
    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType = UNSET
    tool_calls: list[CalledTool] | UnsetType = UNSET


class ChunkChoice(Struct, frozen=True):
    delta: Delta
    finish_reason: Reason = None
    index: int = 0
    logprobs: None = None


class ChatChunk(Struct, frozen=True):
    """One event of a streamed chat. The one that says how it ended also says which generation and artifact gave it."""

    id: str
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: TokenUsage | UnsetType = UNSET  # of the last one, if `stream_options.include_usage` was set
    generation: int | UnsetType = UNSET
    artifact: str | UnsetType = UNSET
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"


class TextChoice(Struct, frozen=True):
    text: str
    finish_reason: Reason = None
    index: int = 0
    logprobs: None = None


class Completion(Struct, frozen=True):
    """OpenAI's answer, whole or as one event, and which generation and artifact gave it."""

    id: str
    created: int
    model: str
    choices: list[TextChoice]
    usage: TokenUsage | UnsetType = UNSET  # of events in the last one, as with chats
    generation: int | UnsetType = UNSET
    artifact: str | UnsetType = UNSET
    object: Literal["text_completion"] = "text_completion"


class ChatAnswer:
    """The answer to one chat."""

    kind = "chatcmpl"
    opening = True  # the first chunk says the role

    def __init__(self, model: str) -> None:
        self.id, self.created, self.model = f"{self.kind}-{secrets.token_hex(12)}", int(time.time()), model
        self._calls = 0
        self._around = _around(ChatChunk(self.id, self.created, model, [ChunkChoice(Delta(content=PLACE))]))

    def whole(self, text: str, calls: list[ToolCall], last: GenerateFrame) -> Struct:
        """All of it."""
        message = AssistantMessage(None if calls and not text else text, tool_calls=_called(calls) if calls else UNSET)
        return ChatCompletion(self.id, self.created, self.model, [ChatChoice(message, _reason(last))], usage(last),
                              last.generation, last.artifact)  # fmt: skip

    def events(self, frame: GenerateFrame) -> bytes:
        """What a frame adds: b"" for one that adds nothing."""
        if frame.tool_calls:
            events = self._chunk(Delta(content=frame.text or UNSET, tool_calls=_called(frame.tool_calls, self._calls)))
            self._calls += len(frame.tool_calls)
        elif frame.text:
            events = encode(frame.text).join(self._around)
        else:
            return b""
        opening, self.opening = self.opening, False
        return self._chunk(Delta("assistant", "")) + events if opening else events

    def ending(self, last: GenerateFrame, with_usage: bool) -> bytes:
        """The last events: how it ended, what it cost if that is wanted, and that it is over."""
        opening = self._chunk(Delta("assistant", "")) if self.opening else b""
        choice = ChunkChoice(Delta(), _reason(last))
        end = ChatChunk(self.id, self.created, self.model, [choice], generation=last.generation, artifact=last.artifact)
        cost = _event(ChatChunk(self.id, self.created, self.model, [], usage(last))) if with_usage else b""
        return opening + _event(end) + cost + DONE

    def _chunk(self, delta: Delta) -> bytes:
        return _event(ChatChunk(self.id, self.created, self.model, [ChunkChoice(delta)]))


class TextAnswer:
    """The answer to one completion; methods as of a chat's."""

    kind = "cmpl"

    def __init__(self, model: str) -> None:
        self.id, self.created, self.model = f"{self.kind}-{secrets.token_hex(12)}", int(time.time()), model
        self._around = _around(Completion(self.id, self.created, model, [TextChoice(PLACE)]))

    def whole(self, text: str, calls: list[ToolCall], last: GenerateFrame) -> Struct:
        choice = TextChoice(text, _reason(last))
        return Completion(self.id, self.created, self.model, [choice], usage(last), last.generation, last.artifact)

    def events(self, frame: GenerateFrame) -> bytes:
        return encode(frame.text).join(self._around) if frame.text else b""

    def ending(self, last: GenerateFrame, with_usage: bool) -> bytes:
        choice = TextChoice("", _reason(last))
        end = Completion(self.id, self.created, self.model, [choice], generation=last.generation, artifact=last.artifact)
        cost = _event(Completion(self.id, self.created, self.model, [], usage(last))) if with_usage else b""
        return _event(end) + cost + DONE


def usage(last: GenerateFrame) -> TokenUsage:
    """What the answer cost; PluginFault "protocol" if the frame does not say."""
    if last.usage is None or not last.finish_reason:
        raise PluginFault("protocol", "the server did not say how its answer ended and what it cost", "see the server's log")
    read, made = last.usage.prompt_tokens, last.usage.completion_tokens
    return TokenUsage(read, made, read + made, CachedTokens(last.usage.cached_tokens))


def _reason(last: GenerateFrame) -> Reason:
    return last.finish_reason or None


def _called(calls: list[ToolCall] | tuple[ToolCall, ...], first: int | None = None) -> list[CalledTool]:
    """In OpenAI's form; numbered from `first` for chunks."""
    return [CalledTool(call.id, FunctionCall(call.name, call.arguments), index=UNSET if first is None else first + k)
            for k, call in enumerate(calls)]  # fmt: skip


def _around(chunk: Struct) -> tuple[bytes, bytes]:
    """What stands before and after the text in all events of an answer that differ in their text alone; in `chunk` it is PLACE."""
    before, _, after = _event(chunk).partition(encode(PLACE))
    return before, after


def _event(struct: Struct) -> bytes:
    return b"data: " + encode(struct) + b"\n\n"
