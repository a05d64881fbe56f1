"""Calls are put together from what a parser gives piece by piece; the parser is played here, vLLM's own is in test_vllm.py."""

from types import SimpleNamespace
from typing import Any

from kernelm_contracts.server import ToolCall
from kernelm_vllm.tools import ToolCalls


def piece(index: int, arguments: str = "", id: str | None = None, name: str | None = None) -> Any:
    return SimpleNamespace(index=index, id=id, function=SimpleNamespace(name=name, arguments=arguments))


class Played:
    """A `vllm.parser.Parser` that gives what `request.script` says."""

    def __init__(self, tokenizer: Any, tools: Any) -> None:
        self.steps = 0

    def parse_delta(self, text: str, tokens: list[int], request: Any, prompt: list[int], *, finished: bool) -> Any:
        content, calls = request.script[self.steps]
        self.steps += 1
        return None if content is None else SimpleNamespace(content=content, tool_calls=calls)


def read(*script: Any) -> tuple[list[tuple[str, tuple[ToolCall, ...]]], bool]:
    calls = ToolCalls(Played, None, SimpleNamespace(tools=(), script=script))
    return [calls.read("", [], [], step == len(script) - 1) for step in range(len(script))], calls.called


def test_a_call_is_sent_when_the_next_begins_or_the_answer_ends() -> None:
    steps, called = read(("Let me see", []), ("", [piece(0, "", "a", "f")]), ("", [piece(0, '{"x"')]), (None, []),
                         ("", [piece(0, ": 1}"), piece(1, "{}", "b", "g")]), ("", []))  # fmt: skip
    assert steps[0] == ("Let me see", ())
    assert [calls for _, calls in steps[1:]] == [(), (), (), (ToolCall("a", "f", '{"x": 1}'),), (ToolCall("b", "g", "{}"),)]
    assert called


def test_a_call_that_was_cut_off_is_none() -> None:
    steps, called = read(("", [piece(0, '{"city": "Os', "a", "weather")]), ("", []))
    assert steps[-1] == ("", ())
    assert not called
