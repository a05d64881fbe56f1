"""Text comes in whole characters, and nothing of a stop string gets out."""

from typing import Any

import pytest

from kernelm_generator.text import TextStream


def stream(tokenizer: Any, text: str, *stops: str, prompt: str = "") -> tuple[list[str], bool, str]:
    """(pieces, whether it was stopped, the rest) when `text` comes byte by byte."""
    core = tokenizer.backend_tokenizer
    made = TextStream(core, core.encode(prompt).ids, stops)
    pieces = []
    for token in core.encode(text).ids:
        piece, stopped = made.push(token)
        pieces.append(piece)
        if stopped:
            return pieces, True, ""
    return pieces, False, made.rest()


def test_a_character_comes_when_it_is_whole(tokenizer: Any) -> None:
    pieces, _, rest = stream(tokenizer, "aé😀z")
    assert ([piece for piece in pieces if piece], rest) == (["a", "é", "😀", "z"], "")
    assert stream(tokenizer, "é", prompt="The end of a prompt: ")[0] == ["", "é"]


@pytest.mark.parametrize(
    ("text", "stops", "wanted"),
    [
        ("one two three", ["two"], "one "),
        ("one two three", ["three", "ne t"], "o"),
        ("ababac", ["abac"], "ab"),
        ("one twin", ["two"], "one twin"),
        ("aaab", ["aab"], "a"),
        ("é stop", ["é"], ""),
        ("end tw", ["two"], "end tw"),
    ],
)
def test_an_answer_ends_before_the_first_stop_string(tokenizer: Any, text: str, stops: list[str], wanted: str) -> None:
    pieces, stopped, rest = stream(tokenizer, text, *stops)
    assert "".join(pieces) + rest == wanted
    assert stopped == any(stop in text for stop in stops)
    assert all(stop not in "".join(pieces[:k]) for stop in stops for k in range(len(pieces)))
