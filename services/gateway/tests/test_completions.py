"""What a server is asked for a request in OpenAI's form."""

from typing import Any

import msgspec
import pytest

from kernelm_contracts.server import GenerateRequest, Message, Tool, ToolCall
from kernelm_gateway.completions import ChatBody, CompletionBody
from kernelm_sdk.errors import ClientFault

HELLO = [{"role": "user", "content": "Hello"}]
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
TOOL = {"type": "function", "function": {"name": "add", "description": "adds", "parameters": SCHEMA, "strict": True}}


def chat(**fields: Any) -> GenerateRequest:
    return msgspec.convert({"model": "m", "messages": HELLO, **fields}, ChatBody).request()


def changed(**fields: Any) -> dict[str, Any]:
    """What of the request is not as in a bare one."""
    bare, asked = chat(), chat(**fields)
    return {f: getattr(asked, f) for f in GenerateRequest.__struct_fields__ if getattr(asked, f) != getattr(bare, f)}


def test_a_bare_chat_takes_the_contracts_defaults() -> None:
    assert chat() == GenerateRequest((Message("user", "Hello"),), model="m", stream=False)


@pytest.mark.parametrize(("fields", "asked"), [
    ({"max_tokens": 5}, {"max_tokens": 5}), ({"max_completion_tokens": 5}, {"max_tokens": 5}),
    ({"max_tokens": 5, "max_completion_tokens": 5}, {"max_tokens": 5}), ({"temperature": 0}, {"temperature": 0.0}),
    ({"top_p": 0.5, "top_k": 4, "seed": -3}, {"top_p": 0.5, "top_k": 4, "seed": -3}), ({"stop": "x"}, {"stop": ("x",)}),
    ({"stop": ["x", "y"]}, {"stop": ("x", "y")}), ({"stop": ""}, {}), ({"stream": True}, {"stream": True}),
    ({"presence_penalty": -2, "frequency_penalty": 2}, {"presence_penalty": -2.0, "frequency_penalty": 2.0}),
    ({"response_format": {"type": "text"}}, {}), ({"response_format": {"type": "json_object"}}, {"schema": {"type": "object"}}),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA, "strict": True}}},
     {"schema": SCHEMA}),
    ({"tools": [TOOL]}, {"tools": (Tool("add", "adds", SCHEMA),)}),
    ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "add"}}},
     {"tools": (Tool("add", "adds", SCHEMA),), "tool_choice": "add"}),
    ({"tools": [TOOL], "tool_choice": "required"}, {"tools": (Tool("add", "adds", SCHEMA),), "tool_choice": "required"}),
    ({"tool_choice": "none"}, {"tool_choice": "none"}),
    ({"adapter": "sha256:1", "at_least": 4}, {"adapter": "sha256:1", "at_least": 4}),
])  # fmt: skip
def test_each_parameter(fields: dict[str, Any], asked: dict[str, Any]) -> None:
    assert changed(**fields) == asked


def test_messages() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": "{}"}}
    asked = chat(messages=[
        {"role": "developer", "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief."}]},
        {"role": "user", "content": "x", "name": "me"}, {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "3"}])  # fmt: skip
    assert asked.messages == (Message("system", "Be brief."), Message("user", "x"),
                              Message("assistant", "", (ToolCall("c1", "add", "{}"),)), Message("tool", "3", (), "c1"))  # fmt: skip


@pytest.mark.parametrize("prompt", [["a", "b"], [], [[1, 2]], [1, 2], "", [""]])
def test_prompts_that_are_not_one_text(prompt: Any) -> None:
    with pytest.raises(ClientFault) as caught:
        msgspec.convert({"model": "m", "prompt": prompt}, CompletionBody).request()
    assert caught.value.details["param"] == "prompt"
