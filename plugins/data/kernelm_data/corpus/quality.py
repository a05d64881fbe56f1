"""Quality rules, each named after its source, whose thresholds are the defaults.

- `gopher-quality`, `gopher-repetition`: Rae et al., "Scaling language models: methods, analysis and insights from training Gopher",
  2021, appendix A.1.1 and table A1.
- `c4`: Raffel et al., "Exploring the limits of transfer learning with a unified text-to-text transformer", 2020, section 2.2,
  without its list of bad words, and its later policy lines.
- `fineweb`: Penedo et al., "The FineWeb datasets", 2024, section 3.5, with the values of the published pipeline (datatrove).

A rule answers with the reason for which a text is dropped, or with the text that stays: `c4` takes lines out.
"""

import difflib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from kernelm_contracts.data import Filter
from kernelm_data.corpus import measures as m
from kernelm_data.corpus.kernels import ASCII, Bytes
from kernelm_sdk.errors import ClientFault

GOPHER_QUALITY = {"min_words": 50, "max_words": 100_000, "min_word_length": 3, "max_word_length": 10, "max_symbols": 0.1,
                  "max_bullets": 0.9, "max_ellipses": 0.3, "min_alphabetic": 0.8, "min_stop_words": 2}  # fmt: skip
GOPHER_REPETITION = {"line": 0.3, "paragraph": 0.3, "line_characters": 0.2, "paragraph_characters": 0.2,
                     "top_2": 0.2, "top_3": 0.18, "top_4": 0.16,
                     "gram_5": 0.15, "gram_6": 0.14, "gram_7": 0.13, "gram_8": 0.12, "gram_9": 0.11, "gram_10": 0.1}  # fmt: skip
C4 = {"min_sentences": 5, "min_words_per_line": 3, "max_word_length": 1000}
FINEWEB = {"min_punctuated_lines": 0.12, "max_short_lines": 0.67, "max_repeated_characters": 0.01, "max_newlines_per_word": 0.3}
POLICY = (b"terms of use", b"privacy policy", b"cookie policy", b"uses cookies", b"use of cookies", b"use cookies", b"javascript")


class Measured:
    """A text and what rules measure in it, each at most once. Reused from text to text."""

    def __init__(self) -> None:
        self.text: Bytes = np.empty(0, np.uint8)
        self.values = np.zeros(m.MEASURES, np.int64)
        self._scanned = False
        self._room(1 << 16)

    def _room(self, size: int) -> None:
        self.words, self.lines = np.empty(size + 1, np.uint64), np.empty(size + 1, np.uint64)
        self.word_lengths, self.line_lengths = np.empty(size + 1, np.int32), np.empty(size + 1, np.int32)
        self.out = np.empty(size + 1, np.uint8)
        self._table, self._counts = np.empty(1 << (2 * size).bit_length(), np.uint64), np.empty(0, np.int32)

    def take(self, text: Bytes) -> None:
        """Measure this text from now on."""
        self.text, self._scanned = text, False
        if len(text) >= len(self.out):
            self._room(1 << len(text).bit_length())

    def scan(self) -> list[int]:
        """The measures, by position in `measures`."""
        if not self._scanned:
            m.scan(self.text, ASCII, m.STOP_HASHES, self.words, self.word_lengths, self.lines, self.line_lengths, self.values)
            self._scanned = True
        return [int(value) for value in self.values]

    def table(self, items: int) -> "np.ndarray[tuple[int], np.dtype[np.uint64]]":
        """A hash table with room for `items`."""
        return self._table[: 1 << max((2 * items).bit_length(), 3)]

    def counts(self, items: int) -> "np.ndarray[tuple[int], np.dtype[np.int32]]":
        """Counters beside `table`."""
        if len(self._counts) < len(self._table):
            self._counts = np.empty(len(self._table), np.int32)
        return self._counts


class Verdict(NamedTuple):
    """What a rule says: `reason` "" if the text stays, `text` if it stays changed, `what` was changed."""

    reason: str = ""
    text: Bytes | None = None
    what: str = ""


KEPT = Verdict()
Rule = Callable[[Measured], Verdict]


def gopher_quality(t: dict[str, float]) -> Rule:
    """Words, their length, symbols, bullets, ellipses, alphabetic and stop words."""

    def rule(text: Measured) -> Verdict:
        v = text.scan()
        words, lines = v[m.WORDS], max(v[m.LINES], 1)
        if words < t["min_words"]:
            return Verdict("fewer words than min_words")
        if words > t["max_words"]:
            return Verdict("more words than max_words")
        mean = v[m.WORD_CHARACTERS] / words
        if mean < t["min_word_length"]:
            return Verdict("mean word length below min_word_length")
        if mean > t["max_word_length"]:
            return Verdict("mean word length above max_word_length")
        if v[m.HASHES] > t["max_symbols"] * words or v[m.ELLIPSES] > t["max_symbols"] * words:
            return Verdict("more symbols per word than max_symbols")
        if v[m.BULLETS] > t["max_bullets"] * lines:
            return Verdict("more bullet lines than max_bullets")
        if v[m.ELLIPSIS_ENDS] > t["max_ellipses"] * lines:
            return Verdict("more lines ending in an ellipsis than max_ellipses")
        if v[m.ALPHABETIC] < t["min_alphabetic"] * words:
            return Verdict("fewer words with a letter than min_alphabetic")
        if v[m.STOPS] < t["min_stop_words"]:
            return Verdict("fewer stop words than min_stop_words")
        return KEPT

    return rule


def gopher_repetition(t: dict[str, float]) -> Rule:
    """Repeated lines, paragraphs and n-grams of words."""
    grams = [(n, t[f"gram_{n}"]) for n in range(5, 11)]
    least = min(share for _, share in grams)

    def rule(text: Measured) -> Verdict:
        v = text.scan()
        n_lines, n_words, size = v[m.LINES], v[m.WORDS], max(v[m.CHARACTERS], 1)
        count, characters = m.repeated(text.lines[:n_lines], text.line_lengths[:n_lines], text.table(n_lines))
        if count > t["line"] * n_lines:
            return Verdict("more repeated lines than line")
        if characters > t["line_characters"] * size:
            return Verdict("more characters in repeated lines than line_characters")
        n = m.paragraph_hashes(text.text, text.lines, text.line_lengths)
        text.take(text.text)  # the lines are gone
        count, characters = m.repeated(text.lines[:n], text.line_lengths[:n], text.table(n))
        if count > t["paragraph"] * n:
            return Verdict("more repeated paragraphs than paragraph")
        if characters > t["paragraph_characters"] * size:
            return Verdict("more characters in repeated paragraphs than paragraph_characters")
        words, lengths, table = text.words[:n_words], text.word_lengths[:n_words], text.table(n_words)
        for n in (2, 3, 4):
            if m.top_gram(words, lengths, n, table, text.counts(n_words)) > t[f"top_{n}"] * size:
                return Verdict(f"most frequent {n}-gram covers more than top_{n}")
        # longer repeated n-grams lie within repeated 5-grams, each of which may count once for two that overlap: if those cover
        # less than half of the least share, no longer ones can cover more than it
        if (five := m.repeated_grams(words, lengths, 5, table)) > t["gram_5"] * size:
            return Verdict("repeated 5-grams cover more than gram_5")
        if five * 2 <= least * size:
            return KEPT
        for n, share in grams[1:]:
            if m.repeated_grams(words, lengths, n, table) > share * size:
                return Verdict(f"repeated {n}-grams cover more than gram_{n}")
        return KEPT

    return rule


def c4(t: dict[str, float]) -> Rule:
    """Only lines that are sentences; no page with code, dummy text or too few sentences."""

    def rule(text: Measured) -> Verdict:
        whole = text.text.tobytes()
        if b"{" in whole:
            return Verdict("curly bracket")
        lower = whole.lower()
        if b"lorem ipsum" in lower:
            return Verdict("lorem ipsum")
        source, policy = text.text, 0
        if any(phrase in lower for phrase in POLICY):
            lines = whole.split(b"\n")
            stay = [line for line in lines if not any(phrase in line.lower() for phrase in POLICY)]
            policy = len(lines) - len(stay)
            source = np.frombuffer(b"\n".join(stay), np.uint8)
        if text.scan()[m.LONGEST] > t["max_word_length"]:
            return Verdict("a word longer than max_word_length")
        n, sentences, left_out = m.sentence_lines(source, ASCII, int(t["min_words_per_line"]), text.out)
        if sentences < t["min_sentences"]:
            return Verdict("fewer sentences than min_sentences")
        if not policy and not left_out:
            return KEPT
        return Verdict("", text.out[:n].copy(), "lines taken out")

    return rule


def fineweb(t: dict[str, float]) -> Rule:
    """Lines without punctuation, short or repeated ones, lists."""

    def rule(text: Measured) -> Verdict:
        v = text.scan()
        n_lines, n_words = v[m.LINES], v[m.WORDS]
        if not n_lines:
            return Verdict("empty")
        if v[m.PUNCTUATED] < t["min_punctuated_lines"] * n_lines:
            return Verdict("fewer lines with punctuation than min_punctuated_lines")
        if v[m.SHORT] > t["max_short_lines"] * n_lines:
            return Verdict("more short lines than max_short_lines")
        _, characters = m.repeated(text.lines[:n_lines], text.line_lengths[:n_lines], text.table(n_lines))
        if characters > t["max_repeated_characters"] * (v[m.CHARACTERS] - v[m.NEWLINES]):
            return Verdict("more characters in repeated lines than max_repeated_characters")
        if v[m.NEWLINES] > t["max_newlines_per_word"] * n_words:
            return Verdict("more newlines per word than max_newlines_per_word")
        return KEPT

    return rule


RULES: dict[str, tuple[Callable[[dict[str, float]], Rule], dict[str, float]]] = {
    "gopher-quality": (gopher_quality, GOPHER_QUALITY), "gopher-repetition": (gopher_repetition, GOPHER_REPETITION),
    "c4": (c4, C4), "fineweb": (fineweb, FINEWEB),
}  # fmt: skip


def thresholds(field: str, given: dict[str, float | str], defaults: dict[str, float]) -> dict[str, float]:
    """The defaults with what is given in their place; ClientFault for a name that is not among them, or no number."""
    for name, value in given.items():
        if name not in defaults or isinstance(value, str):
            close = difflib.get_close_matches(name, defaults, 1)
            hint = f"; did you mean {close[0]!r}?" if close and name not in defaults else ""
            raise ClientFault("invalid", f"{field}: {name} = {value!r} is no threshold of this rule{hint}",
                              f"give numbers for {', '.join(defaults)}")  # fmt: skip
    return {**defaults, **{name: float(value) for name, value in given.items()}}


def rules(filters: Sequence[Filter]) -> list[tuple[str, Rule]]:
    """Name and rule of each filter that is one of `RULES`."""
    chosen = []
    for i, filter in enumerate(filters):
        if filter.use in RULES:
            make, defaults = RULES[filter.use]
            chosen.append((filter.use, make(thresholds(f"filters[{i}] ({filter.use})", filter.settings, defaults))))
    return chosen
