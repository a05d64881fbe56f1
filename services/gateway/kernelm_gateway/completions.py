"""What OpenAI's clients ask for in words: chats and completions, and how each is asked of `server/1.generate`.

A parameter is honoured, has no effect on an answer (`user`, `metadata`, ...), or is refused: as with OpenAI an unknown one
is, and so is what no server of ours can do (`n` above 1, `logprobs`, pictures). null is the same as left out.
Source: OpenAI API reference, "Create chat completion" and "Create completion".
"""

from typing import Annotated, Any, Literal

from msgspec import UNSET, Meta, Struct, UnsetType

from kernelm_contracts.server import GenerateRequest, Message, Tool, ToolCall
from kernelm_sdk.errors import ClientFault

Natural = Annotated[int, Meta(ge=0)]
Tokens = Annotated[int, Meta(ge=1, le=2**31 - 1)] | None
Seed = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None
Penalty = Annotated[float, Meta(ge=-2, le=2)] | None
Stop = str | Annotated[list[str], Meta(max_length=64)] | None
Name = Annotated[str, Meta(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]


class TextPart(Struct, frozen=True, forbid_unknown_fields=True):
    """A piece of a message; of all types of OpenAI's, those that are text."""

    type: str
    text: str | UnsetType = UNSET
    image_url: Any = None  # these are known only to be refused by their name
    input_audio: Any = None
    file: Any = None


Content = str | list[TextPart] | None


class FunctionCall(Struct, frozen=True):
    name: str
    arguments: str  # JSON text


class AskedCall(Struct, frozen=True):
    """A call that the assistant has asked for, in the chat so far."""

    id: str
    function: FunctionCall
    type: Literal["function"] = "function"


class ChatMessage(Struct, frozen=True, forbid_unknown_fields=True):
    """One turn. `developer` is what OpenAI calls `system` now; `name`, `refusal` and `annotations` are not shown to a model."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content = None  # null for an assistant that asked for calls alone
    tool_calls: list[AskedCall] | None = None
    tool_call_id: str | None = None
    name: str | None = None
    refusal: str | None = None
    annotations: Any = None
    audio: None = None
    function_call: None = None


class FunctionSpec(Struct, frozen=True):
    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None  # JSON Schema
    strict: bool | None = None


class ToolSpec(Struct, frozen=True):
    function: FunctionSpec
    type: Literal["function"] = "function"


class FunctionName(Struct, frozen=True):
    name: str


class ToolChoice(Struct, frozen=True, forbid_unknown_fields=True):
    """The one function that must be asked for."""

    function: FunctionName
    type: Literal["function"] = "function"


class JsonSchema(Struct, frozen=True):
    name: Name
    schema: dict[str, Any] | None = None
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(Struct, frozen=True, forbid_unknown_fields=True):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StreamOptions(Struct, frozen=True, forbid_unknown_fields=True):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None  # there is none


class Sampling(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What chats and completions have in common."""

    model: str  # the deployment
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Tokens = None  # None for the server's own limit
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    stop: Stop = None
    seed: Seed = None
    presence_penalty: Penalty = None
    frequency_penalty: Penalty = None
    top_k: Natural | None = None  # as vLLM has it; 0 for all
    response_format: ResponseFormat | None = None
    adapter: str | None = None  # ours: digest of the LoRA adapter to answer with
    at_least: Natural = 0  # ours: refuse with 409 if the deployment's generation is lower
    user: str | None = None  # no effect, as the four that follow
    metadata: Any = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    n: int | None = None  # 1, as one request gets one answer
    logit_bias: Any = None  # none


class ChatBody(Sampling, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """OpenAI's request for the next turn of a chat."""

    messages: Annotated[list[ChatMessage], Meta(min_length=1)]
    max_completion_tokens: Tokens = None  # the new name of `max_tokens`
    tools: Annotated[list[ToolSpec], Meta(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    parallel_tool_calls: bool | None = None  # true
    logprobs: bool | None = None  # false
    top_logprobs: int | None = None  # 0
    modalities: list[str] | None = None  # ["text"]

    def request(self) -> GenerateRequest:
        """The same for `server/1`."""
        _refuse_unless(self, n=(None, 1), logit_bias=(None, {}), logprobs=(None, False), top_logprobs=(None, 0),
                       modalities=(None, ["text"]), parallel_tool_calls=(None, True))  # fmt: skip
        if self.max_tokens and self.max_completion_tokens and self.max_tokens != self.max_completion_tokens:
            raise _wrong("max_tokens", "differs from `max_completion_tokens`", "give one of them")
        tools = tuple(Tool(t.function.name, t.function.description or "", t.function.parameters or {}) for t in self.tools or ())
        return GenerateRequest(tuple(_message(k, m) for k, m in enumerate(self.messages)), tools=tools,
                               tool_choice=_choice(self.tool_choice, tools),
                               **_sampling(self, self.max_completion_tokens or self.max_tokens))  # fmt: skip


class CompletionBody(Sampling, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """OpenAI's request to go on with a text."""

    prompt: str | list[str | int | list[int]]  # one text, or a list that holds one
    best_of: int | None = None  # 1
    echo: bool | None = None  # false
    logprobs: int | None = None  # none
    suffix: str | None = None  # none

    def request(self) -> GenerateRequest:
        """The same for `server/1`."""
        _refuse_unless(self, n=(None, 1), logit_bias=(None, {}), best_of=(None, 1), echo=(None, False), logprobs=(None,),
                       suffix=(None, ""))  # fmt: skip
        texts = [self.prompt] if isinstance(self.prompt, str) else self.prompt
        if len(texts) != 1 or not isinstance(texts[0], str):
            raise _wrong("prompt", "must be one text", "send one request a text; token numbers are not taken")
        if not texts[0]:
            raise _wrong("prompt", "is empty", "send a text to go on with")
        return GenerateRequest(prompt=texts[0], **_sampling(self, self.max_tokens))


def _sampling(body: Sampling, max_tokens: int | None) -> dict[str, Any]:
    if body.stream_options is not None and not body.stream:
        raise _wrong("stream_options", "is given without `stream`", "leave it out, or set `stream`")
    stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    fields = {"max_tokens": max_tokens or 0, "stop": tuple(filter(None, stop)), "seed": body.seed, "at_least": body.at_least,
              "model": body.model, "schema": _schema(body.response_format), "stream": bool(body.stream)}  # fmt: skip
    for name in ("temperature", "top_p", "top_k", "presence_penalty", "frequency_penalty", "adapter"):
        if (value := getattr(body, name)) is not None:
            fields[name] = value
    return fields


def _schema(form: ResponseFormat | None) -> dict[str, Any]:
    if form is None or form.type == "text":
        return {}
    if form.type == "json_object":
        return {"type": "object"}
    if form.json_schema is None or not form.json_schema.schema:
        raise _wrong("response_format.json_schema.schema", "is missing", "give the JSON Schema that the answer must follow")
    return form.json_schema.schema


def _message(index: int, message: ChatMessage) -> Message:
    where, asked = f"messages[{index}]", message.tool_calls or ()
    if message.content is None and not asked:
        raise _wrong(f"{where}.content", "is missing", "send a text")
    if message.role == "tool" and not message.tool_call_id:
        raise _wrong(f"{where}.tool_call_id", "is missing", "say which call this is the outcome of")
    calls = tuple(ToolCall(call.id, call.function.name, call.function.arguments) for call in asked)
    role: Any = "system" if message.role == "developer" else message.role
    return Message(role, _text(where, message.content), calls, message.tool_call_id or "")


def _text(where: str, content: Content) -> str:
    if isinstance(content, str):
        return content
    for k, part in enumerate(content or ()):
        if part.type != "text" or part.text is UNSET:
            raise _unsupported(f"{where}.content[{k}].type", f"{part.type!r} is not supported", 'send parts of type "text"')
    return "".join(str(part.text) for part in content or ())


def _choice(given: str | ToolChoice | None, tools: tuple[Tool, ...]) -> str:
    if isinstance(given, ToolChoice):
        if given.function.name not in [tool.name for tool in tools]:
            raise _wrong("tool_choice", f"there is no tool {given.function.name[:64]!r}", "name one of `tools`")
        return given.function.name
    if given == "required" and not tools:
        raise _wrong("tool_choice", "is given without `tools`", "give `tools` to choose from")
    return given or ""


def _refuse_unless(body: Sampling, **allowed: tuple[Any, ...]) -> None:
    for name, values in allowed.items():
        if (value := getattr(body, name)) not in values:
            neutral = " or ".join("null" if v is None else str(v).lower() for v in values)
            raise _unsupported(name, f"{str(value)[:64]} is not supported", f"leave it out, or send {neutral}")


def _wrong(param: str, what: str, remedy: str) -> ClientFault:
    return ClientFault("invalid", f"{param}: {what}", remedy, param=param)


def _unsupported(param: str, what: str, remedy: str) -> ClientFault:
    return ClientFault("unsupported_parameter", f"{param}: {what}", remedy, param=param)
