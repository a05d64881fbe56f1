"""What is refused before vLLM sees it, and how a request is put into its words; no vLLM."""

from typing import Any

import pytest

from kernelm_contracts.server import GenerateRequest, Message, Tool, ToolCall
from kernelm_sdk.errors import ClientFault
from kernelm_vllm.memory import Plan
from kernelm_vllm.requests import chat, check, refusal, sampling
from kernelm_vllm.settings import Settings

PLAN = Plan(context=256, max_tokens=100, cache_mb=64, needed_mb=2000)
HELLO, TOOL = (Message("user", "Hello"),), Tool("weather", "of a city", {"type": "object"})
ABLE = Settings(tool_parser="hermes", adapters=2)


@pytest.mark.parametrize("wrong", [
    {}, {"prompt": "x", "messages": HELLO}, {"prompt": "x", "max_tokens": 101}, {"prompt": "x", "max_tokens": -1},
    {"prompt": "x", "temperature": -0.1}, {"prompt": "x", "top_p": 0.0}, {"prompt": "x", "top_k": -1},
    {"prompt": "x", "stop": ("",)},
    {"prompt": "x", "presence_penalty": 2.5}, {"prompt": "x", "frequency_penalty": -3.0}, {"prompt": "x", "tools": (TOOL,)},
    {"messages": HELLO, "tool_choice": "required"}, {"messages": HELLO, "tools": (TOOL,), "tool_choice": "other"},
    {"messages": HELLO, "tools": (TOOL,), "schema": {"type": "object"}},
])  # fmt: skip
def test_what_has_no_meaning_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ClientFault) as caught:
        check(GenerateRequest(**wrong), ABLE, PLAN, chats=True)
    assert caught.value.code == "invalid"


@pytest.mark.parametrize(("request_", "field"), [
    (GenerateRequest(messages=HELLO), "messages"),
    (GenerateRequest(messages=HELLO, tools=(TOOL,)), "tools"),
    (GenerateRequest(prompt="x", adapter="sha256:" + "ab" * 32), "adapter"),
])  # fmt: skip
def test_what_this_pool_can_not_do_is_named(request_: GenerateRequest, field: str) -> None:
    with pytest.raises(ClientFault, match=f"`{field}`") as caught:
        check(request_, Settings(), PLAN, chats=field != "messages")
    assert caught.value.code == "unsupported_parameter"
    check(request_, ABLE, PLAN, chats=True)


def test_tools_that_must_not_be_called_need_no_parser() -> None:
    request = GenerateRequest(messages=HELLO, tools=(TOOL,), tool_choice="none")
    check(request, Settings(), PLAN, chats=True)
    assert "tools" not in chat(request)


def test_a_chat_is_put_into_openai_s_words() -> None:
    turns = (*HELLO, Message("assistant", "", (ToolCall("1", "weather", '{"city": "Oslo"}'),)), Message("tool", "rain", (), "1"))
    asked = chat(GenerateRequest(messages=turns, tools=(TOOL,), tool_choice="weather", top_k=3, seed=-1))
    assert asked["messages"][1]["tool_calls"][0]["function"] == {"name": "weather", "arguments": '{"city": "Oslo"}'}
    assert asked["messages"][2] == {"role": "tool", "content": "rain", "tool_call_id": "1"}
    assert asked["tool_choice"] == {"type": "function", "function": {"name": "weather"}}
    assert asked["tools"][0]["function"]["parameters"] == {"type": "object"}
    assert (asked["top_k"], asked["seed"]) == (3, 2**63 - 1)
    assert chat(GenerateRequest(messages=HELLO, schema={"type": "object"}))["response_format"]["type"] == "json_schema"
    assert sampling(GenerateRequest(prompt="x"))["seed"] is None


def test_what_vllm_raises_is_the_callers_fault_or_its_own() -> None:
    class VLLMClientError(Exception):
        parameter = "input_tokens"

    class EngineDeadError(Exception):
        pass

    assert refusal(VLLMClientError("too long")).code == "too_large"
    assert (refusal(ValueError("no such schema")).code, refusal(ValueError("x")).whose) == ("invalid", "client")
    assert refusal(EngineDeadError()).retriable
    secret = refusal(KeyError("what the caller wrote"))
    assert (secret.whose, "caller" in secret.message) == ("plugin", False)
