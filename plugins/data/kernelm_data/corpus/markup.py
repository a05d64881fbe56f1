"""HTML and PDF to text.

HTML goes to Resiliparse, which keeps the main content; its time grows with the square of the depth of nesting, so that what is
nested deeper than any page is (`MAX_DEPTH`) has its tags taken out instead, in one pass.
"""

import html
from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit

from kernelm_data.corpus.kernels import Bytes
from kernelm_data.corpus.streams import Broken

MAX_DEPTH = 256  # elements; browsers stop at 512
VOID = (
    "area",
    "base",
    "br",
    "col",
    "embed",
    "hr",
    "img",
    "input",
    "link",
    "meta",
    "source",
    "track",
    "wbr",
    "p",
    "li",
    "td",
    "tr",
    "th",
    "dt",
    "dd",
    "option",
)  # fmt: skip - without an end tag, or often left without
HIDDEN = ("script", "style", "template", "noscript", "svg")
INLINE = (
    "a",
    "abbr",
    "b",
    "bdi",
    "bdo",
    "cite",
    "code",
    "em",
    "i",
    "kbd",
    "mark",
    "q",
    "s",
    "samp",
    "small",
    "span",
    "strong",
    "sub",
    "sup",
    "time",
    "tt",
    "u",
    "var",
    "font",
)


def _key(name: str) -> int:
    key = 0
    for byte in name.encode()[:8]:
        key = key << 8 | byte
    return key


VOID_KEYS, HIDDEN_KEYS, INLINE_KEYS = (np.array([_key(n) for n in names], np.uint64) for names in (VOID, HIDDEN, INLINE))


@njit(cache=True, nogil=True)
def _among(key: np.uint64, keys: npt.NDArray[np.uint64]) -> bool:
    for k in keys:  # noqa: SIM110 - compiled
        if k == key:
            return True
    return False


@njit(cache=True, nogil=True)
def _tag(text: Bytes, i: int) -> tuple[np.uint64, bool, int]:
    """Name (its first 8 letters in lower case), whether it is an end tag, and the position after the tag that starts at `i`."""
    i += 1
    closing = i < len(text) and text[i] == 0x2F
    i += closing
    key = np.uint64(0)
    letters = 0
    while i < len(text) and (0x61 <= text[i] | 0x20 <= 0x7A or (letters and 0x30 <= text[i] <= 0x39)):
        if letters < 8:
            key = (key << np.uint64(8)) | np.uint64(text[i] | 0x20 if text[i] >= 0x41 else text[i])
        letters += 1
        i += 1
    quote = 0
    while i < len(text) and (quote or text[i] != 0x3E):
        if quote:
            if text[i] == quote:
                quote = 0
        elif text[i] == 0x22 or text[i] == 0x27:
            quote = text[i]
        i += 1
    return key, closing, min(i + 1, len(text))


@njit(cache=True, nogil=True)
def depth(text: Bytes, void: npt.NDArray[np.uint64]) -> int:
    """How deep elements are nested, roughly: elements that may stay open don't count."""
    deepest, now, i = 0, 0, 0
    while i < len(text):
        if text[i] != 0x3C:
            i += 1
            continue
        key, closing, i = _tag(text, i)
        if key and not _among(key, void):
            now = max(now - 1, 0) if closing else now + 1
            deepest = max(deepest, now)
    return deepest


@njit(cache=True, nogil=True)
def strip_tags(text: Bytes, hidden: npt.NDArray[np.uint64], inline: npt.NDArray[np.uint64], out: Bytes) -> int:
    """Write what stands between tags to `out`, a newline for each tag that is no inline element; bytes written."""
    i, n = 0, 0
    skip = np.uint64(0)  # the element whose end is looked for
    while i < len(text):
        if text[i] == 0x3C and i + 1 < len(text):
            if text[i + 1] == 0x21 and i + 3 < len(text) and text[i + 2] == 0x2D and text[i + 3] == 0x2D:
                i += 4
                while i < len(text) and not (text[i] == 0x3E and text[i - 1] == 0x2D and text[i - 2] == 0x2D):
                    i += 1
                i += 1
                continue
            if text[i + 1] == 0x2F or text[i + 1] == 0x21 or text[i + 1] == 0x3F or 0x61 <= text[i + 1] | 0x20 <= 0x7A:
                key, closing, i = _tag(text, i)
                if skip:
                    if closing and key == skip:
                        skip = np.uint64(0)
                elif not closing and _among(key, hidden):
                    skip = key
                elif not _among(key, inline) and n and out[n - 1] != 0x0A:
                    out[n] = 0x0A
                    n += 1
                continue
        if not skip:
            out[n] = text[i]
            n += 1
        i += 1
    return n


def html_text(data: bytes | str) -> tuple[str, list[str]]:
    """The main content of a page, and what was done about it. `Broken` for bytes that are no text."""
    from resiliparse.extract.html2text import extract_plain_text
    from resiliparse.parse.encoding import bytes_to_str, detect_encoding
    from resiliparse.parse.html import HTMLTree

    if isinstance(data, str):
        data = data.encode("utf-8", "surrogatepass")
    notes = []
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        encoding = detect_encoding(data, from_html_meta=True) or "utf-8"
        text = bytes_to_str(data, encoding)
        notes.append(f"decoded from {encoding}")
        if text.count("\ufffd") > 0.02 * len(text):
            raise Broken("unknown encoding", f"{encoding} leaves {text.count(chr(0xFFFD)):,} characters broken") from None
    raw = np.frombuffer(text.encode("utf-8", "replace"), np.uint8)
    if depth(raw, VOID_KEYS) > MAX_DEPTH:
        out = np.empty(len(raw) + 1, np.uint8)
        size = strip_tags(raw, HIDDEN_KEYS, INLINE_KEYS, out)
        return html.unescape(out[:size].tobytes().decode("utf-8", "replace")), [*notes, "nested too deep: only the tags taken out"]
    tree = HTMLTree.parse(text)
    return extract_plain_text(tree, main_content=True, alt_texts=False, list_bullets=False), notes


def pdf_text(data: bytes) -> str:
    """The text of all pages. `Broken` for what is no PDF, or locked by a password."""
    import pypdfium2 as pdfium

    try:
        document: Any = pdfium.PdfDocument(data)
    except pdfium.PdfiumError as error:
        raise Broken("broken pdf", str(error)) from None
    try:
        parts = []
        for page in document:
            text = page.get_textpage()
            parts.append(text.get_text_bounded())
            text.close()
            page.close()
        return "\n\n".join(parts)
    except pdfium.PdfiumError as error:
        raise Broken("broken pdf", str(error)) from None
    finally:
        document.close()
