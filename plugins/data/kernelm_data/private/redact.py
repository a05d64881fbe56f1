"""Typed placeholders in place of private values."""

import hashlib
import hmac
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Literal

from kernelm_data.private.spans import Span

Style = Literal["type", "number", "hash"]
STYLES: tuple[Style, ...] = ("type", "number", "hash")
HASH_DIGITS = 16  # hexadecimal, of HMAC-SHA-256
MIN_KEY_BYTES = 16


class Placeholders:
    """Gives each value its placeholder.

    "type": `[EMAIL]`. "number": `[EMAIL_1]`, the same value the same number as long as this object lives. "hash":
    `[EMAIL:9f86d081884c7d65]`, the same value the same hash under the same `key`: values stay linkable across datasets for who
    has the key, and cannot be guessed back by who has not (a hash without key of a phone number can). ValueError for a
    style that is not known, and for a hash with a key of fewer than 16 bytes.
    """

    def __init__(self, style: Style = "type", key: bytes = b"") -> None:
        if style not in STYLES:
            raise ValueError(f"style: {style!r} is not known; known are {', '.join(STYLES)}")
        if style == "hash" and len(key) < MIN_KEY_BYTES:
            raise ValueError(f"style 'hash' needs a secret key of {MIN_KEY_BYTES} bytes or more, not {len(key)}")
        self.style, self._key = style, key
        self._numbers: dict[tuple[str, bytes], int] = {}
        self._counts = Counter[str]()

    def __call__(self, kind: str, value: str) -> str:
        label = kind.upper()
        if self.style == "type":
            return f"[{label}]"
        if self.style == "hash":
            message = f"{kind}:{canonical(kind, value)}".encode()
            return f"[{label}:{hmac.digest(self._key, message, 'sha256').hex()[:HASH_DIGITS]}]"
        # a digest stands for the value: nothing private is kept while the answers of a long session are redacted
        known = (kind, hashlib.sha256(canonical(kind, value).encode()).digest())
        if known not in self._numbers:
            self._counts[kind] += 1
            self._numbers[known] = self._counts[kind]
        return f"[{label}_{self._numbers[known]}]"


def canonical(kind: str, value: str) -> str:
    """One spelling of values that are the same: no separators in numbers, no case in addresses."""
    value = unicodedata.normalize("NFKC", value)  # full-width digits
    if kind in ("phone", "card", "iban", "national_id"):
        return "".join(c for c in value if c.isalnum() or c == "+").upper()
    return " ".join(value.split()).casefold() if kind in ("email", "name") else value


def redact(
    text: str, spans: Iterable[Span], style: Style = "type", key: bytes = b"", placeholders: Placeholders | None = None
) -> str:
    """The text with a placeholder for each of the disjoint, sorted `spans`. `placeholders`: to share numbers among texts;
    else made of `style` and `key`."""
    name = placeholders or Placeholders(style, key)
    parts, at = [], 0
    for span in spans:
        parts += [text[at : span.start], name(span.type, text[span.start : span.end])]
        at = span.end
    return "".join([*parts, text[at:]])


def count(spans: Sequence[Span]) -> dict[str, int]:
    """Type -> spans, without the values."""
    return dict(sorted(Counter(span.type for span in spans).items()))
