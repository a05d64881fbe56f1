"""What has no meaning is refused before vLLM sees it; and what vLLM refuses is put into the contract's words."""

from typing import Any

from kernelm_contracts.admission import require_meaning
from kernelm_contracts.server import GenerateRequest
from kernelm_sdk.errors import ClientFault, Fault, PluginFault
from kernelm_vllm.memory import Plan
from kernelm_vllm.settings import Settings

SEEDS = 2**63  # vLLM keeps a seed in 64 bits with a sign


def check(request: GenerateRequest, settings: Settings, plan: Plan, chats: bool) -> None:
    """ClientFault that names the field: `invalid` for what has no meaning, `unsupported_parameter` for what this pool can't do."""
    require_meaning(request, plan.max_tokens)
    unknown = request.tool_choice not in ("", "auto", "none", "required", *(tool.name for tool in request.tools))
    for wrong, what, remedy in (
        (bool(request.prompt and request.tools), "`tools` are given with a `prompt`", "send `messages`"),
        (bool(request.tool_choice and not request.tools), "`tool_choice` is given without `tools`", "leave it out"),
        (bool(request.tools and request.schema), "`tools` and `schema` are given", "leave one out"),
        (unknown, f"`tool_choice` {request.tool_choice!r} is none of `tools`", "name one of them"),
    ):  # fmt: skip
        if wrong:
            raise ClientFault("invalid", what, remedy)
    for missing, field, remedy in (
        (request.messages and not chats, "messages", "the model has no chat template: send a `prompt`"),
        (request.tools and request.tool_choice != "none" and not settings.tool_parser, "tools",
         "deploy the model with the setting `tool_parser`"),
        (request.adapter and not settings.adapters, "adapter", "deploy the model with the setting `adapters`"),
    ):  # fmt: skip
        if missing:
            raise ClientFault("unsupported_parameter", f"`{field}` is given, and this deployment can't honour it", remedy)


def sampling(request: GenerateRequest) -> dict[str, Any]:
    """What vLLM calls by the same names in all its requests."""
    names = ("temperature", "top_p", "top_k", "presence_penalty", "frequency_penalty")
    seed = None if request.seed is None else request.seed % SEEDS
    return {name: getattr(request, name) for name in names} | {"stop": list(request.stop), "seed": seed}


def chat(request: GenerateRequest) -> dict[str, Any]:
    """The request as OpenAI's API has it, without what bounds the answer's length."""
    messages: list[dict[str, Any]] = []
    for message in request.messages:
        turn: dict[str, Any] = {"role": message.role, "content": message.content}
        if message.tool_calls:
            turn["tool_calls"] = [{"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                                  for call in message.tool_calls]  # fmt: skip
        if message.tool_call_id:
            turn["tool_call_id"] = message.tool_call_id
        messages.append(turn)
    asked = {"model": request.model, "messages": messages, **sampling(request)}
    if request.schema:
        asked["response_format"] = {"type": "json_schema", "json_schema": {"name": "answer", "schema": request.schema}}
    if request.tools and request.tool_choice != "none":
        nothing = {"type": "object", "properties": {}}
        functions = [{"name": t.name, "description": t.description, "parameters": t.parameters or nothing} for t in request.tools]
        asked["tools"] = [{"type": "function", "function": function} for function in functions]
        choice = request.tool_choice or "auto"
        asked["tool_choice"] = choice if choice in ("auto", "required") else {"type": "function", "function": {"name": choice}}
    return asked


def refusal(error: Exception) -> Fault:
    """The fault for what vLLM raised of a request."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    text = str(error)[:300]
    if "EngineDeadError" in kinds:
        return PluginFault("engine", "vLLM's engine has ended", "call again: another instance is on its way", retriable=True)
    if getattr(error, "parameter", None) in ("input_text", "input_tokens"):
        return ClientFault("too_large", text, "send less")
    if "VLLMClientError" in kinds or "ValueError" in kinds:
        return ClientFault("invalid", text, "these are vLLM's own words")
    return PluginFault("engine", f"vLLM failed with {type(error).__name__}", "see the log of the instance", retriable=True)
