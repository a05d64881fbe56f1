"""Clean text: mojibake, Unicode form, control characters, whitespace, in this order. Paragraphs stay."""

import re
import unicodedata
from collections.abc import Callable
from typing import Literal, cast

import ftfy

from kernelm_contracts.data import Clean

FORMS = ("NFC", "NFD", "NFKC", "NFKD")  # Unicode Standard Annex 15

# C0 and C1 but tab and newlines, zero-width space, word joiner, byte order mark, and the marks that change the direction
# of text; not the zero-width joiners, which carry meaning in Persian, Hindi and emoji
CONTROL = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f"
                     "\u200b\u200e\u200f\u202a-\u202e\u2060-\u2064\u2066-\u2069\ufeff\ufff9-\ufffb]")
LINE_BREAK = re.compile("\r\n|[\r\v\f\x85\u2028\u2029]")
BLANK = re.compile(r"[^\S\n]+")
AROUND_BREAK = re.compile(r" ?\n ?")
PARAGRAPH = re.compile(r"\n{3,}")

# the encoding only: quotation marks, ligatures and entities are the author's
MOJIBAKE = ftfy.TextFixerConfig(
    unescape_html=False, remove_terminal_escapes=False, fix_latin_ligatures=False, fix_character_width=False,
    uncurl_quotes=False, fix_line_breaks=False, fix_surrogates=True, remove_control_chars=False, normalization=None,
)  # fmt: skip


def cleaner(settings: Clean) -> Callable[[str], tuple[str, list[str]]]:
    """A function from a text to the clean text and the names of what was changed in it."""
    steps: list[tuple[str, Callable[[str], str]]] = []
    if settings.fix_mojibake:
        steps.append(("mojibake fixed", lambda text: ftfy.fix_text(text, MOJIBAKE)))
    if settings.normalize:
        form = cast(Literal["NFC", "NFD", "NFKC", "NFKD"], settings.normalize)
        steps.append((f"brought to {form}", lambda text: unicodedata.normalize(form, text)))
    if settings.drop_control:
        steps.append(("control characters dropped", lambda text: CONTROL.sub("", text)))
    if settings.collapse_whitespace:
        steps.append(("whitespace collapsed", collapse_whitespace))

    def clean(text: str) -> tuple[str, list[str]]:
        changes = []
        for name, step in steps:
            if (better := step(text)) != text:
                changes.append(name)
                text = better
        return text, changes

    return clean


def collapse_whitespace(text: str) -> str:
    """One blank between words, one newline between lines, one empty line between paragraphs, none at the ends."""
    text = BLANK.sub(" ", LINE_BREAK.sub("\n", text))
    return PARAGRAPH.sub("\n\n", AROUND_BREAK.sub("\n", text)).strip()
