"""`detect`: fast scans over the whole text decide where the exact rules look.

Most texts hold nothing that even resembles a private value. One pass of RE2 (linear in the text, no backtracking) finds that
out; the rules, their checksums and numbering plans see the candidates' surroundings only.
"""

import re
from collections.abc import Iterable, Iterator
from functools import cache

import re2

from kernelm_data.private import identifiers, network, numbers, secrets
from kernelm_data.private.names import Names, load_names
from kernelm_data.private.spans import LEFT, TYPES, WIDEST, Rule, Span, merge

RULED = tuple(kind for kind in TYPES if kind != "name")

DIGITS = r"\d(?:[ \x{a0}.\-/()+]{0,3}\d){6}"
LETTERED = r"[A-Z]{2} ?\d{2}|\d{6}[-+A]\d{3}"  # IBAN, codice fiscale, PAN, NINO, HETU
ANY = re2.compile("|".join((DIGITS, network.HINT, LETTERED, secrets.PREFIXES, secrets.HINT)))
ZONE = re2.compile(r"[+(]{0,2}\d(?:[ \x{a0}.\-/()+]{0,3}\d){6,}")
LETTERED_ZONE = re2.compile(LETTERED)

WITH_LETTERS = frozenset(("IBAN", "UK NINO", "IT codice fiscale", "IN PAN", "FI HETU"))
# any word that a rule wants to see before a number: the words, without what may stand between
CONTEXT = re2.compile("(?i)" + "|".join(sorted({rule.context.pattern.removeprefix("(?i)").rpartition("[^")[0]
                                               for rule in (*numbers.RULES, *identifiers.RULES) if rule.context is not None})))
MARGIN = 16  # characters before a zone where a candidate may start: letters, a sign, a bracket

# digits, letters and the signs of numbers as Chinese and Japanese keyboards write them, one for one, so that positions stay
WIDE = {0xFF01 + i: 0x21 + i for i in range(94) if chr(0x21 + i).isalnum() or chr(0x21 + i) in "@.+-()"}
IS_WIDE = re.compile(f"[\ud800-\udfff{''.join(map(chr, WIDE))}]")
WIDE |= dict.fromkeys(range(0xD800, 0xE000), 0xFFFD)  # a lone surrogate cannot be searched: it has no UTF-8


def detect(text: str, types: Iterable[str] = RULED, names: bool = False) -> list[Span]:
    """The private values in `text`: disjoint spans, sorted.

    `types`: of TYPES; a name in it is the same as `names`, which asks for the names of persons, by a model that is some
    thousand times slower than the rest. ValueError for an unknown type; ModuleNotFoundError, with the remedy, if the models
    of names are not installed.
    """
    return Detector(types, names).detect(text)


class Detector:
    """`detect` with its settings checked and its rules chosen once. Holds no text; safe to share among threads."""

    def __init__(self, types: Iterable[str] = RULED, names: bool = False) -> None:
        chosen = frozenset(types)
        if unknown := sorted(chosen - set(TYPES)):
            raise ValueError(f"private types {', '.join(unknown)} are not known; known are {', '.join(TYPES)}")
        self.types = chosen
        self.names: Names | None = load_names() if names or "name" in chosen else None
        self._plain, self._called, self._lettered = _rules(chosen)

    def detect(self, text: str) -> list[Span]:
        """The private values in `text`: disjoint spans, sorted."""
        text = as_read(text)
        found = list(self.rules(text))
        if self.names is not None:
            found += self.names.find(text)
        return merge(found) if found else []

    def rules(self, text: str) -> Iterator[Span]:
        """What the rules find, overlapping ones too; `text` as `as_read` gives it."""
        if "email" in self.types and "@" in text:
            yield from network.find_email(text)
        if ANY.search(text) is None:
            return
        for zone in ZONE.finditer(text):
            start, end = zone.span()
            for rule in self._in_zone(text, max(start - MARGIN, 0), end):
                yield from rule.find(text, max(start - MARGIN, 0), end)
        if self._lettered:
            for zone in LETTERED_ZONE.finditer(text):
                start, end = zone.span()
                for rule in self._lettered:
                    yield from rule.find(text, max(start - MARGIN, 0), end)
        if "ip" in self.types:
            yield from network.find_ip(text)
        if "secret" in self.types:
            yield from secrets.find_issued(text)
            yield from secrets.find_assigned(text)


    def _in_zone(self, text: str, start: int, end: int) -> Iterator[Rule]:
        """The rules that may find something among these digits; most zones are dates, and no rule's."""
        if self._plain.may(text, start, end):
            yield from self._plain.rules
        if self._called.rules and CONTEXT.search(text[max(start - LEFT, 0) : end]):
            yield from self._called.rules
        if "phone" in self.types and ("+" in text[start:end] or "00" in text[start:end]):
            yield from numbers.INTERNATIONAL


def as_read(text: str) -> str:
    """The text with full-width digits, letters and signs of numbers (U+FF08 to U+FF5A) as ASCII, and lone surrogates as U+FFFD;
    as long as it was."""
    if not text.isascii() and IS_WIDE.search(text):
        return text.translate(WIDE)
    return text


class Group:
    """Rules whose candidates all start alike, and one pattern that tells whether any of them has a candidate."""

    def __init__(self, rules: Iterable[Rule]) -> None:
        self.rules = tuple(rules)
        forms = [rule.pattern.pattern.removeprefix(numbers.BEFORE) for rule in self.rules]
        self._any = re.compile(numbers.BEFORE + "(?:" + "|".join(forms) + ")") if forms else None

    def may(self, text: str, start: int, end: int) -> bool:
        return self._any is not None and self._any.search(text, start, min(end + WIDEST, len(text))) is not None


@cache
def _rules(types: frozenset[str]) -> tuple[Group, Group, tuple[Rule, ...]]:
    """Those of digits that need no word before them, those that do, and those with letters."""
    chosen = [rule for rule in (*numbers.RULES, numbers.IBAN, *identifiers.RULES) if rule.type in types]
    digits = [rule for rule in chosen if rule.name not in WITH_LETTERS]
    return (Group(rule for rule in digits if rule.context is None), Group(rule for rule in digits if rule.context is not None),
            tuple(rule for rule in chosen if rule.name in WITH_LETTERS))  # fmt: skip
