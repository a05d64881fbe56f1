"""What a detector finds, and how overlapping finds become one."""

import re
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

TYPES = ("email", "phone", "card", "iban", "national_id", "ip", "secret", "name")
PRIORITY = {kind: rank for rank, kind in enumerate(("secret", "iban", "card", "national_id", "email", "phone", "ip", "name"))}

LEFT = 64  # characters to the left of a span that a rule may look at
WIDEST = 64  # characters of the longest candidate of a `Rule`, with what it looks at on its right
LONGEST = 8192  # characters of the longest span, a PEM block, with what a rule looks at on its right


class Span(NamedTuple):
    """A private value: `text[start:end]`. It never carries the value itself."""

    start: int  # characters, as are all positions here
    end: int
    type: str  # one of TYPES
    score: float  # 0 to 1: how sure the rule is, by the share of its finds that are true on the labelled set of its tests
    rule: str


Find = Callable[[str, int, int], Iterator[Span]]  # the text, and the first and the last position where a span may start


class Rule(NamedTuple):
    """One way to find one type. A rule is local: whether `text[s:e]` is a span is decided by `text[s - LEFT:s + LONGEST]`
    alone, and never by what was found elsewhere. Streaming rests on that."""

    name: str
    type: str
    pattern: re.Pattern[str]  # finds the start of every candidate; group 1 is the candidate
    check: Callable[[str], int]  # how many characters of the candidate are a value; 0 for none
    score: float
    context: re.Pattern[str] | None = None  # must be found in the LEFT characters before it
    unless: re.Pattern[str] | None = None  # must not be found there

    def find(self, text: str, start: int, end: int) -> Iterator[Span]:
        for match in self.pattern.finditer(text, start, min(end + WIDEST, len(text))):
            a = match.start(1)
            if a > end:
                return
            left = text[max(a - LEFT, 0) : a]
            if self.unless is not None and self.unless.search(left):
                continue
            if self.context is not None and not self.context.search(left):
                continue
            if length := self.check(match[1]):
                yield Span(a, a + length, self.type, self.score, self.name)


def merge(spans: Iterable[Span]) -> list[Span]:
    """Disjoint spans, sorted. Those that overlap become one that covers them all, with the type of the strongest: a value
    of which two rules see a part each must not leave a piece behind."""
    merged: list[Span] = []
    for span in sorted(spans):
        if merged and span.start < merged[-1].end:
            last = merged[-1]
            best = min(last, span, key=lambda s: (PRIORITY[s.type], -s.score))
            merged[-1] = best._replace(start=last.start, end=max(last.end, span.end))
        else:
            merged.append(span)
    return merged


GROUP_END = re.compile(r"(?<=[0-9A-Za-z])(?=[^0-9A-Za-z])")


def whole(valid: Callable[[str], bool]) -> Callable[[str], int]:
    """A check that takes all of a candidate or nothing."""
    return lambda text: len(text) if valid(text) else 0


def longest(valid: Callable[[str], bool]) -> Callable[[str], int]:
    """A check that takes as many groups of a candidate as are valid: a year or a card's security code may follow."""

    def check(text: str) -> int:
        for end in (len(text), *reversed([match.start() for match in GROUP_END.finditer(text)])):
            if valid(text[:end]):
                return end
        return 0

    return check


def words(*alternatives: str) -> str:
    """A pattern for any of these words, ASCII ones only where they stand alone."""
    alone = [w for w in alternatives if w.isascii()]
    inside = [w for w in alternatives if not w.isascii()]
    return "|".join([*([rf"\b(?:{'|'.join(alone)})\b"] if alone else []), *inside])


def near(*alternatives: str, within: int = 24) -> re.Pattern[str]:
    """One of these words at the end of what stands before, with at most `within` characters, no digit and no end of a sentence
    in between."""
    return re.compile(rf"(?i)(?:{words(*alternatives)})[^\n\d!?;\u3002\uff01\uff1f\uff1b]{{0,{within}}}\Z")
