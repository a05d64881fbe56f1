"""Calls of tools in an answer, as vLLM's parsers find them: text goes on as it comes, a call when it is whole."""

import json
from typing import Any

from kernelm_contracts.server import ToolCall


class ToolCalls:
    """Reads one answer. `parser_type` is a `vllm.parser.Parser`, `request` OpenAI's as vLLM has it."""

    def __init__(self, parser_type: Any, tokenizer: Any, request: Any) -> None:
        self._parser, self._request = parser_type(tokenizer, request.tools), request
        self._open: dict[int, list[str]] = {}  # place in the answer -> id, name, arguments so far
        self.called = False

    def read(self, text: str, tokens: list[int], prompt: list[int], finished: bool) -> tuple[str, tuple[ToolCall, ...]]:
        """(text to show, calls that are whole now) for what one step added. A call is whole when another begins, or at the end."""
        delta = self._parser.parse_delta(text, tokens, self._request, prompt, finished=finished)
        for call in delta.tool_calls if delta is not None else ():
            parts = self._open.setdefault(call.index, ["", "", ""])
            parts[0] = call.id or parts[0]
            if call.function is not None:
                parts[1] = call.function.name or parts[1]
                parts[2] += call.function.arguments or ""
        whole = sorted(self._open) if finished else sorted(self._open)[:-1]
        found = (ToolCall(*self._open.pop(index)) for index in whole)
        calls = tuple(call for call in found if _whole(call))  # one that `max_tokens` cut off is none
        self.called = self.called or bool(calls)
        return (delta.content or "" if delta is not None else ""), calls


def _whole(call: ToolCall) -> bool:
    try:
        json.loads(call.arguments)
    except ValueError:
        return False
    return bool(call.name)
