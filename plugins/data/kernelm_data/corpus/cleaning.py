"""Cleaning steps over UTF-8 bytes, in the order of the request. What can't change a text is found out before anything is done to
it.

The results are those of `kernelm_data.clean`, which is short and slow; a test holds them together.
"""

import html
import re
import unicodedata
from collections.abc import Callable, Sequence
from typing import Literal, cast

import ftfy
import ftfy.badness
import numpy as np

from kernelm_contracts.data import Clean, CleanStep
from kernelm_data.clean import FORMS, MOJIBAKE
from kernelm_data.corpus.kernels import ASCII, Bytes, adjacent, tidy, unsure
from kernelm_sdk.errors import ClientFault

Step = Callable[[bytes], bytes]


def _special() -> Bytes:
    """The characters of which ftfy's pattern for mojibake is made, by code point. All its alternatives need two of them side by
    side (1), but those of C1 controls, of the ligatures and of A with tilde or circumflex (2)."""
    pattern = re.sub(r"\\x([0-9a-f]{2})", lambda match: chr(int(match[1], 16)), ftfy.badness.BADNESS_RE.pattern)
    table = np.zeros(0x3000, np.uint8)
    for first, last in re.findall(r"([^\x00-\x7f])-([^\x00-\x7f])", pattern):
        table[ord(first) : ord(last) + 1] = 1
    table[[ord(c) for c in pattern if 0x80 <= ord(c) < 0x3000]] = 1
    table[0x80:0xA0] = 2
    table[[ord(c) for c in "\u0152\u0153\u00c2\u00c3"]] = 2
    return table


SPECIAL = _special()


UNSURE = 255


def _classes() -> Bytes:
    """Of the code points below 0x3000 the canonical combining class, UNSURE for what NFC changes or puts together with a character
    before it: the quick check of Unicode's annex 15."""
    characters = list(map(chr, range(0x3000)))
    table = np.fromiter(map(unicodedata.combining, characters), np.uint8, len(characters))
    for code, character in enumerate(characters):
        parts = unicodedata.decomposition(character).split()
        if len(parts) == 2 and not parts[0].startswith("<") and (second := int(parts[1], 16)) < len(table):
            table[second] = UNSURE
        if not unicodedata.is_normalized("NFC", character):
            table[code] = UNSURE
    table[0x1161:0x1200] = UNSURE  # Hangul is composed by rule
    return table


def _sure() -> Bytes:
    """By blocks of 16 code points, 1 where NFC leaves each as it is, whatever stands beside it; frequent blocks from 0x3000 on."""
    table = np.zeros(0x2000, np.uint8)
    for first, last in ((0x300, 0x301), (0x303, 0x308), (0x30A, 0x31F), (0x340, 0x4DB), (0x4E0, 0x9FF), (0xAC0, 0xD79),
                        (0xFE0, 0xFE1), (0xFF0, 0xFFE), (0x1F00, 0x1FAF)):  # fmt: skip
        table[first : last + 1] = 1
    return table


CLASSES, SURE, NONE = _classes(), _sure(), np.zeros(0, np.uint8)

# of lines that belong to a site and to no document; C4 and jusText list the same kinds
BOILERPLATE = (
    b"all rights reserved",
    b"skip to content",
    b"skip to main content",
    b"cookie policy",
    b"we use cookies",
    b"uses cookies",
    b"privacy policy",
    b"terms of service",
    b"terms of use",
    b"share on facebook",
    b"share on twitter",
    b"sign up for our newsletter",
    b"subscribe to our",
    b"log in to comment",
    b"back to top",
    b"toggle navigation",
    b"table of contents",
    b"javascript is disabled",
    b"enable javascript",
    b"\xc2\xa9 copyright",
    b"copyright \xc2\xa9",
)

SETTINGS: dict[str, dict[str, float | str]] = {
    "mojibake": {},
    "normalize": {"form": "NFC"},
    "control": {},
    "whitespace": {},
    "boilerplate": {"max_words": 12},
    "html-entities": {},
}


class Tidy:
    """Control characters and whitespace, in one pass."""

    def __init__(self, drop_control: bool, collapse: bool) -> None:
        self._drop_control, self._collapse = drop_control, collapse
        self._out = np.empty(1 << 16, np.uint8)

    def __call__(self, text: bytes, changes: list[str]) -> bytes:
        if len(text) + 8 > len(self._out):
            self._out = np.empty(1 << (len(text) + 8).bit_length(), np.uint8)
        size, dropped, spaced = tidy(np.frombuffer(text, np.uint8), self._out, ASCII, self._drop_control, self._collapse)
        if not dropped and not spaced:
            return text
        if dropped:
            changes.append("control characters dropped")
        if spaced:
            changes.append("whitespace collapsed")
        return self._out[:size].tobytes()


def mended(text: bytes, find: Callable[[Bytes, int], int], mend: Callable[[str], str]) -> bytes:
    """The text with `mend` applied to those lines in which `find`, from a position on, finds something; -1 for nothing."""
    if text.isascii():
        return text
    array = np.frombuffer(text, np.uint8)
    at, begin, parts = find(array, 0), 0, list[bytes]()
    while at >= 0:
        start, end = text.rfind(b"\n", 0, at) + 1, text.find(b"\n", at)
        end = len(text) if end < 0 else end
        line = text[start:end].decode()
        if (better := mend(line)) is not line:
            parts += [text[begin:start], better.encode()]
            begin = end
        at = find(array, end)
    return b"".join((*parts, text[begin:])) if parts else text


def fix_mojibake(text: bytes) -> bytes:
    """ftfy, line by line as it does it, on those lines only that its pattern finds bad; the pattern runs at 1 MB/s, so that it is
    asked only where the characters are of which it is made."""
    return mended(text, lambda array, start: adjacent(array, SPECIAL, start),
                  lambda line: ftfy.fix_text(line, MOJIBAKE) if ftfy.badness.is_bad(line) else line)  # fmt: skip


def normalize(form: Literal["NFC", "NFD", "NFKC", "NFKD"]) -> Step:
    """Lines can be brought to a form one by one: no character goes together with a newline."""

    def mend(line: str) -> str:
        return line if unicodedata.is_normalized(form, line) else unicodedata.normalize(form, line)

    classes, sure = (CLASSES, SURE) if form == "NFC" else (NONE, NONE)
    return lambda text: mended(text, lambda array, start: unsure(array, classes, sure, start), mend)


def drop_boilerplate(max_words: int) -> Step:
    def step(text: bytes) -> bytes:
        lower = text.lower()
        if not any(phrase in lower for phrase in BOILERPLATE):
            return text
        stay = [line for line in text.split(b"\n")
                if len(line.split()) > max_words or not any(phrase in line.lower() for phrase in BOILERPLATE)]  # fmt: skip
        return b"\n".join(stay)

    return step


def unescape(text: bytes) -> bytes:
    return html.unescape(text.decode()).encode("utf-8", "replace") if b"&" in text else text


def as_steps(clean: Clean) -> tuple[CleanStep, ...]:
    """The steps that `PrepareRequest.clean` stands for."""
    steps = [CleanStep("mojibake")] if clean.fix_mojibake else []
    steps += [CleanStep("normalize", {"form": clean.normalize})] if clean.normalize else []
    steps += [CleanStep("control")] if clean.drop_control else []
    return (*steps, *([CleanStep("whitespace")] if clean.collapse_whitespace else []))


def check_steps(steps: Sequence[CleanStep]) -> None:
    """ClientFault, naming the field, for a step or setting that does not exist."""
    for i, step in enumerate(steps):
        if step.do not in SETTINGS:
            raise ClientFault("invalid", f"steps[{i}].do: {step.do!r} is no step", f"give one of {', '.join(SETTINGS)}")
        for name, value in step.settings.items():
            fits = name in SETTINGS[step.do] and isinstance(value, str) == isinstance(SETTINGS[step.do][name], str)
            if not fits or (name == "form" and value not in FORMS):
                raise ClientFault("invalid", f"steps[{i}] ({step.do}).settings: {name} = {value!r} makes no sense",
                                  f"this step has {SETTINGS[step.do] or 'no settings'}; forms are {', '.join(FORMS)}")  # fmt: skip


def cleaner(steps: Sequence[CleanStep]) -> Callable[[bytes], tuple[bytes, list[str]]]:
    """A function from a text to the clean text and the names of what was changed in it."""
    plan: list[tuple[str, Step] | Tidy] = []
    flags: list[str] = []
    for step in steps:
        settings = {**SETTINGS[step.do], **step.settings}
        if step.do in ("control", "whitespace") and step.do not in flags and flags != ["whitespace"]:
            flags.append(step.do)
            plan = (
                [*plan[:-1], Tidy(True, True)] if len(flags) == 2 else [*plan, Tidy(step.do == "control", step.do == "whitespace")]
            )
            continue
        flags = []
        match step.do:
            case "control":
                plan.append(Tidy(True, False))
            case "whitespace":
                plan.append(Tidy(False, True))
            case "mojibake":
                plan.append(("mojibake fixed", fix_mojibake))
            case "normalize":
                form = cast(Literal["NFC", "NFD", "NFKC", "NFKD"], settings["form"])
                plan.append((f"brought to {form}", normalize(form)))
            case "boilerplate":
                plan.append(("boilerplate lines dropped", drop_boilerplate(int(settings["max_words"]))))
            case "html-entities":
                plan.append(("HTML entities replaced", unescape))

    def clean(text: bytes) -> tuple[bytes, list[str]]:
        changes: list[str] = []
        for step in plan:
            if isinstance(step, Tidy):
                text = step(text, changes)
            elif (better := step[1](text)) is not text and better != text:
                changes.append(step[0])
                text = better
        return text, changes

    return clean
