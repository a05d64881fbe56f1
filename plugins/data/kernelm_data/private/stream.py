"""Redaction of a text that comes in pieces: an answer while a model writes it."""

import re
from collections import Counter

from kernelm_data.private.detect import Detector, as_read
from kernelm_data.private.names import unit_end
from kernelm_data.private.persons import Persons
from kernelm_data.private.redact import Placeholders
from kernelm_data.private.secrets import PEM_START
from kernelm_data.private.spans import LEFT, LONGEST, WIDEST, Span, merge

CONTEXT = 2 * LEFT + WIDEST  # characters of what was given out that rules may still look back at
# words that may go on over a space: with a digit, without a letter, or a group of an IBAN or a NINO. Any other word ends
# whatever was before it
OPEN_WORD = re.compile(r"\d|^\W*$|(?:^|[^0-9A-Za-z])[A-Z]{1,4}$")
WORD = re.compile(r"(\S+)\s+")
# text without spaces: after such a character nothing goes on
HAN_END = re.compile("[\u3001\u3002\u3400-\u4dbf\u4e00-\u9fff\uff0c\uff1b\uff01\uff1f]")


State = tuple[str, int, tuple[str, ...]]  # context and what is held back; characters of context; parts of names so far


class Redactor:
    """Redacts a stream: the pieces that come back, put together, are what `redact` makes of the whole, wherever it was cut; but a
    part of a name that stands alone is one only behind the whole name.

    `feed` gives back all that is safe by now; `close` the rest. What may still become part of a private value is held back:
    the last word, or as many as look like groups of a number, and from `-----BEGIN ` on, a private key; with names, the
    sentence. Never more than `LIMIT` characters, in a line of numbers without end; 8,192 in a private key.
    """

    LIMIT = 2 * LONGEST

    def __init__(self, detector: Detector, placeholders: Placeholders | None = None, state: State = ("", 0, ())) -> None:
        self._detector, self._placeholders = detector, placeholders or Placeholders()
        self._text, self._given, parts = state  # context that was given out, then what is held back; characters of context
        self._persons = Persons(parts)
        self.found = Counter[str]()  # type -> values redacted so far

    @property
    def state(self) -> State:
        """For another `Redactor` to go on from. It holds private text."""
        return self._text, self._given, self._persons.parts

    @property
    def held(self) -> int:
        """Characters that are held back."""
        return len(self._text) - self._given

    def feed(self, chunk: str) -> str:
        """Text that is safe to give out, possibly none."""
        self._text += chunk
        end = self._safe_end()
        return self._give(end) if end > self._given else ""

    def close(self) -> str:
        """What was held back. The redactor is then ready for another text, and keeps its numbers."""
        rest = self._give(len(self._text))
        self._text, self._given, self._persons = "", 0, Persons()
        return rest

    def _safe_end(self) -> int:
        """Up to where no value can still grow; `self._given` if nowhere."""
        end = self._given
        for match in WORD.finditer(self._text, self._given):
            if not OPEN_WORD.search(match[1]):
                end = match.end()
            elif "\n" in match[0][len(match[1]) :]:
                end = match.end()  # only a private key goes on over the end of a line
        for match in HAN_END.finditer(self._text, end):
            end = match.end()
        end = min(end, self._key_start(end))
        if len(self._text) - self._given > self.LIMIT:
            end = max(end, len(self._text) - LONGEST)
        return self._unit_end(end)

    def _key_start(self, end: int) -> int:
        """Where a private key starts that may not have ended; `end` if there is none."""
        start = self._text.find(PEM_START, self._given)
        while 0 <= start < end:
            if len(self._text) - start < LONGEST:
                return start
            start = self._text.find(PEM_START, start + 1)
        return end

    def _unit_end(self, limit: int) -> int:
        """The last end of a unit of names up to `limit`; `limit` without names."""
        if self._detector.names is None:
            return limit
        end = self._given
        while (next_end := unit_end(self._text, end)) is not None and next_end <= limit:
            end = next_end
        return end

    def _give(self, end: int) -> str:
        spans = self._find(end)
        for span in spans:
            if span.start < end < span.end:  # only where LIMIT forces an end
                end = self._unit_end(span.start)
        parts, at = [], self._given
        for span in spans:
            if span.end > end:
                break
            parts += [self._text[at : span.start], self._placeholders(span.type, self._text[span.start : span.end])]
            self.found[span.type] += 1
            at = span.end
        parts.append(self._text[at:end])
        drop = max(end - CONTEXT, 0)
        self._text, self._given = self._text[drop:], end - drop
        return "".join(parts)

    def _find(self, end: int) -> list[Span]:
        text = as_read(self._text)
        # the context may start within a word: what rules see in it was decided when it was given out
        found = [span for span in self._detector.rules(text) if span.start >= self._given]
        if self._detector.names is not None:
            found += [s._replace(start=s.start + self._given, end=s.end + self._given)
                      for s in self._detector.names.find(text[self._given : end], self._persons)]  # fmt: skip
        return merge(found)
