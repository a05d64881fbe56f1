"""What runs over every byte, compiled by Numba: whitespace and control characters, words, lines, MinHash.

Texts are UTF-8 in arrays of bytes. Compiled code is cached beside this file, or in the user's cache where that is read-only.
Measured (one core of an EPYC with AVX-512): README.md.
"""

import numpy as np
import numpy.typing as npt
from numba import njit

Bytes = npt.NDArray[np.uint8]
Hashes = npt.NDArray[np.uint64]

PRIME = np.uint64(0x9E3779B97F4A7C15)
SHIFT = np.uint64(29)
MIX = np.uint64(0xBF58476D1CE4E5B9)
ZERO = np.uint64(0)

# classes of characters
LETTER, BLANK, BREAK, CONTROL, MARK, ALONE, CARRIAGE = 0, 1, 2, 3, 4, 5, 6


def _classes() -> Bytes:
    table = np.full(128, MARK, np.uint8)
    for code in range(128):
        if chr(code).isalnum() or code == 0x5F:
            table[code] = LETTER
    table[:32] = CONTROL
    table[127] = CONTROL
    table[[0x20, 0x09]] = BLANK
    table[[0x0A, 0x0B, 0x0C]] = BREAK
    table[0x0D] = CARRIAGE
    return table


ASCII = _classes()


@njit(cache=True, inline="always")
def width(lead: int) -> int:
    """Bytes of the character that starts with this byte."""
    if lead < 0x80:
        return 1
    if lead < 0xE0:
        return 2
    return 3 if lead < 0xF0 else 4


@njit(cache=True, inline="always")
def code_point(text: Bytes, i: int, size: int) -> int:
    """The character of `size` bytes at `i`."""
    if size == 2:
        return ((text[i] & 0x1F) << 6) | (text[i + 1] & 0x3F)
    if size == 3:
        return ((text[i] & 0x0F) << 12) | ((text[i + 1] & 0x3F) << 6) | (text[i + 2] & 0x3F)
    return ((text[i] & 0x07) << 18) | ((text[i + 1] & 0x3F) << 12) | ((text[i + 2] & 0x3F) << 6) | (text[i + 3] & 0x3F)


@njit(cache=True)
def wide_class(code: int) -> int:
    """The class of a character beyond ASCII; the sets are those of `kernelm_data.clean` and `kernelm_data.duplicates`."""
    if code < 0x250:
        if code == 0x85:
            return BREAK
        if code < 0xA0:
            return CONTROL
        if code == 0xA0:
            return BLANK
        letter = code >= 0xC0 and code != 0xD7 and code != 0xF7
        digit = code == 0xB2 or code == 0xB3 or code == 0xB9 or 0xBC <= code <= 0xBE
        return LETTER if letter or digit or code == 0xAA or code == 0xB5 or code == 0xBA else MARK
    if code == 0x1680 or 0x2000 <= code <= 0x200A or code == 0x202F or code == 0x205F or code == 0x3000:
        return BLANK
    if code == 0x2028 or code == 0x2029:
        return BREAK
    if (
        code == 0x200B
        or code == 0x200E
        or code == 0x200F
        or 0x202A <= code <= 0x202E
        or 0x2060 <= code <= 0x2064
        or 0x2066 <= code <= 0x2069
        or code == 0xFEFF
        or 0xFFF9 <= code <= 0xFFFB
    ):
        return CONTROL
    if 0x0E00 <= code <= 0x0E7F or 0x3040 <= code <= 0x30FF or 0x3400 <= code <= 0x4DBF or 0x4E00 <= code <= 0x9FFF:
        return ALONE
    if 0x2000 <= code <= 0x206F or 0x2190 <= code <= 0x2BFF or 0x3001 <= code <= 0x303F or 0xFF01 <= code <= 0xFF0F:
        return MARK
    return LETTER


@njit(cache=True, nogil=True)
def tidy(text: Bytes, out: Bytes, ascii_class: Bytes, drop_control: bool, collapse: bool) -> tuple[int, int, bool]:
    """Write `text` to `out` without control characters, with one blank between words, one newline between lines and one
    empty line between paragraphs: `kernelm_data.clean` in one pass. The number of bytes, of characters dropped, and whether
    whitespace changed."""
    i, n, dropped = 0, 0, 0
    breaks, blanks, carriage = 0, False, False
    whitespace_in, whitespace_out = 0, 0  # a change keeps neither the number of bytes nor their sum
    sum_in, sum_out = 0, 0
    size_of = len(text)
    while i < size_of:
        lead = text[i]
        if lead < 0x80:
            size, kind = 1, ascii_class[lead]
        else:
            size = width(lead)
            kind = wide_class(code_point(text, i, size))
        if kind == CONTROL:
            separator = 0x1C <= lead <= 0x1F  # Python counts them as whitespace
            if drop_control:
                dropped += 1
                i += size
                continue
            kind = BLANK if separator and collapse else MARK
        if collapse and (kind == BLANK or kind == BREAK or kind == CARRIAGE):  # noqa: SIM109 - compiled
            for k in range(size):
                sum_in += text[i + k]
            whitespace_in += size
            if kind == BLANK:
                blanks = True
            elif not (carriage and lead == 0x0A):
                breaks += 1
            carriage = kind == CARRIAGE
            i += size
            continue
        carriage = False
        if n > 0 and breaks > 0:
            for _ in range(min(breaks, 2)):
                out[n] = 0x0A
                n += 1
                sum_out += 0x0A
                whitespace_out += 1
        elif n > 0 and blanks:
            out[n] = 0x20
            n += 1
            sum_out += 0x20
            whitespace_out += 1
        breaks, blanks = 0, False
        if size == 1:
            out[n] = lead
        else:
            for k in range(size):
                out[n + k] = text[i + k]
        n += size
        i += size
    return n, dropped, whitespace_in != whitespace_out or sum_in != sum_out


@njit(cache=True, nogil=True)
def adjacent(text: Bytes, special: Bytes) -> bool:
    """Whether two characters stand side by side that `special`, by code point, marks with 1, or there is one that it marks with
    2."""
    i, before = 0, 0
    while i < len(text):
        if text[i] < 0x80:
            i += 1
            before = 0
            continue
        size = width(text[i])
        code = code_point(text, i, size)
        mark = special[code] if code < len(special) else 0
        if mark == 2 or (mark and before):
            return True
        before = mark
        i += size
    return False


@njit(cache=True, nogil=True)
def shingles(text: Bytes, ascii_class: Bytes, gram: int, out: Hashes) -> int:
    """The hashes of the word n-grams of a text in lower case, in order and with repetitions; fewer words than `gram` give one.
    `out` has room for len(text) + 1 values. Words as in `kernelm_data.duplicates`."""
    ring = np.zeros(16, np.uint64)
    words, n, i = 0, 0, 0
    h = ZERO
    inside = False
    end = len(text)
    while i <= end:
        kind, size = MARK, 1
        if i < end:
            lead = text[i]
            if lead < 0x80:
                kind = ascii_class[lead]
            else:
                size = width(lead)
                kind = wide_class(code_point(text, i, size))
        if kind == LETTER:
            for k in range(size):
                byte = text[i + k]
                if 0x41 <= byte <= 0x5A:
                    byte |= 0x20
                h = (h ^ np.uint64(byte)) * PRIME
                h ^= h >> SHIFT
            inside = True
            i += size
            continue
        alone = kind == ALONE
        if inside or alone:
            rounds = 2 if inside and alone else 1
            for r in range(rounds):
                if alone and r == rounds - 1:
                    h = ZERO
                    for k in range(size):
                        h = (h ^ np.uint64(text[i + k])) * PRIME
                        h ^= h >> SHIFT
                ring[words & 15] = h
                words += 1
                h = ZERO
                if words >= gram:
                    g = ZERO
                    for k in range(words - gram, words):
                        g = (g ^ ring[k & 15]) * PRIME
                        g ^= g >> SHIFT
                    out[n] = g * MIX ^ (g >> SHIFT)
                    n += 1
            inside = False
        i += size
    if n == 0:
        g = ZERO
        for k in range(words):
            g = (g ^ ring[k & 15]) * PRIME
            g ^= g >> SHIFT
        if words == 0:
            for byte in text:
                g = (g ^ np.uint64(byte)) * PRIME
                g ^= g >> SHIFT
        out[0] = g * MIX ^ (g >> SHIFT)
        n = 1
    return n


@njit(cache=True, nogil=True, fastmath=True)
def sketch(grams: Hashes, a: npt.NDArray[np.uint32], b: npt.NDArray[np.uint32], out: npt.NDArray[np.uint32]) -> None:
    """MinHash: for each permutation x -> a x + b (mod 2^32, a odd) the least value over all n-grams."""
    for j in range(len(out)):
        out[j] = 0xFFFFFFFF
    for i in range(len(grams)):
        x = np.uint32(grams[i] >> np.uint64(32))
        for j in range(len(out)):
            value = np.uint32(np.uint32(a[j] * x) + b[j])
            out[j] = value if value < out[j] else out[j]


@njit(cache=True, nogil=True)
def band_keys(signature: npt.NDArray[np.uint32], rows: int, out: Hashes) -> None:
    """A key for each band of `rows` values."""
    for band in range(len(out)):
        g = np.uint64(band + 1) * MIX
        for k in range(rows):
            g = (g ^ np.uint64(signature[band * rows + k])) * PRIME
            g ^= g >> SHIFT
        out[band] = g


@njit(cache=True, nogil=True)
def shares_any(grams: Hashes, table: Hashes) -> bool:
    """Whether any of the n-grams is in the hash table of `make_table`."""
    mask = np.uint64(len(table) - 1)
    for g in grams:
        slot = g & mask
        while table[slot] != ZERO:
            if table[slot] == g:
                return True
            slot = (slot + np.uint64(1)) & mask
    return False


@njit(cache=True, nogil=True)
def fill_table(grams: Hashes, table: Hashes) -> None:
    """Put n-grams into an open table, whose size is a power of two and at least twice their number."""
    mask = np.uint64(len(table) - 1)
    for g in grams:
        slot = g & mask
        while table[slot] != ZERO and table[slot] != g:
            slot = (slot + np.uint64(1)) & mask
        table[slot] = g


@njit(cache=True, nogil=True)
def jaccard(one: Hashes, other: Hashes) -> float:
    """Exact Jaccard similarity of two sorted arrays without repetitions."""
    i, j, common = 0, 0, 0
    while i < len(one) and j < len(other):
        if one[i] == other[j]:
            common += 1
            i += 1
            j += 1
        elif one[i] < other[j]:
            i += 1
        else:
            j += 1
    total = len(one) + len(other) - common
    return common / total if total else 1.0
