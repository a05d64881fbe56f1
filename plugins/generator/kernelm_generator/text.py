"""Tokens to text as they come: whole characters only, and nothing of a stop string."""

from collections.abc import Sequence

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

BEFORE = 8  # tokens of the prompt that the decoder sees, so that a first word keeps its space


class TextStream:
    """The text of one answer."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stops: Sequence[str]) -> None:
        self._tokenizer, self._stops = tokenizer, stops
        self._decoder = DecodeStream(ids=list(prompt[-BEFORE:]), skip_special_tokens=True)
        self._held = ""  # may be the beginning of a stop string

    def push(self, token: int) -> tuple[str, bool]:
        """(what is certain to belong to the answer now, whether a stop string has ended it)."""
        text = self._held + (self._decoder.step(self._tokenizer, token) or "")
        ends = [at for at in (text.find(stop) for stop in self._stops) if at >= 0]
        if ends:
            self._held = ""
            return text[: min(ends)], True
        certain = len(text) - max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[certain:]
        return text[:certain], False

    def rest(self) -> str:
        """What was held back, when the answer has ended in another way."""
        return self._held


def _overlap(text: str, stop: str) -> int:
    """The longest end of `text` that `stop` begins with."""
    return next((k for k in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:k])), 0)
