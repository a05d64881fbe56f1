"""What runs over every byte, compiled by Numba: whitespace and control characters, words, lines, MinHash.

Texts are UTF-8 in arrays of bytes. Compiled code is cached beside this file, or in the user's cache where that is read-only.
Measured (one core of an EPYC with AVX-512): README.md.
"""

import numpy as np
import numpy.typing as npt
from numba import njit

from kernelm_data.corpus.eight import HIGH, get, leading, letters, lower, members, put, solid, tidied

Bytes = npt.NDArray[np.uint8]
Bounds = npt.NDArray[np.int64]
Hashes = npt.NDArray[np.uint64]

PRIME = np.uint64(0x9E3779B97F4A7C15)
SHIFT = np.uint64(29)
MIX = np.uint64(0xBF58476D1CE4E5B9)
ZERO, ONE, HALF = np.uint64(0), np.uint64(1), np.uint64(32)

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
PLAIN = np.zeros(256, np.uint8)  # by byte: 1 for what is written as it stands, 2 for what is so between two of those
PLAIN[:128] = (ASCII == LETTER) | (ASCII == MARK)
PLAIN[[0x20, 0x0A]] = 2
EACH = 1 << 32  # what a byte of whitespace counts beside its value


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
def written(text: Bytes, i: int, out: Bytes, n: int) -> int:
    """Copy the bytes of `text` from `i` on, which stand as they are, to `out` from `n` on; how many they were. Before `i` is a
    visible character."""
    begin, run = i, 8
    while run >= 7 and i + 8 <= len(text):  # of the last byte of 8 it is not known what is behind it
        chunk = get(text, i)
        put(out, n, chunk)  # what is behind the run is written over
        run = leading(~tidied(chunk) & HIGH)
        n, i = n + run, i + run
    while run >= 7 and i + 1 < len(text) and (PLAIN[text[i]] | (PLAIN[text[i]] >> 1 & PLAIN[text[i + 1]])) & 1:
        out[n] = text[i]
        n, i = n + 1, i + 1
    return i - begin


@njit(cache=True, nogil=True)
def indentation(text: Bytes, i: int) -> int:
    """How many blanks there are from `i` on."""
    begin, run = i, 8
    while run == 8 and i + 8 <= len(text):
        run = leading(solid(get(text, i)))
        i += run
    while run == 8 and i < len(text) and text[i] == 0x20:
        i += 1
    return i - begin


@njit(cache=True, nogil=True)
def line_ends(text: Bytes, i: int) -> tuple[int, int]:
    """Where the newlines from `i` on end, and the blanks behind each; how many newlines that are."""
    lines = 0
    while i < len(text) and text[i] == 0x0A:
        i += 1 + indentation(text, i + 1)
        lines += 1
    return i, lines


@njit(cache=True, nogil=True)
def tidy(text: Bytes, out: Bytes, ascii_class: Bytes, drop_control: bool, collapse: bool) -> tuple[int, int, bool]:
    """Write `text` to `out`, which has room for 8 bytes more, without control characters, with one blank between words, one
    newline between lines and one empty line between paragraphs: `kernelm_data.clean` in one pass. The number of bytes, of
    characters dropped, and whether whitespace changed."""
    i, n, dropped, size_of = 0, 0, 0, len(text)
    breaks, blanks, carriage = 0, False, False
    change = 0  # whitespace that was read less what was written: other whitespace has another number of bytes or another sum
    while i < size_of:
        lead = text[i]
        if lead == 0x0A and collapse and n > 0 and breaks == 0 and not blanks:  # most lines of most texts end like this
            k, lines = line_ends(text, i)
            if k < size_of and PLAIN[text[k]] == 1:
                stay = min(lines, 2)
                out[n], out[n + 1], out[n + stay] = 0x0A, 0x0A, text[k]
                change += EACH * (k - i - stay) + 0x20 * (k - i - lines) + 0x0A * (lines - stay)
                plain = written(text, k + 1, out, n + stay + 1) + 1
                n, i = n + stay + plain, k + plain
                continue
        size, kind = 1, ascii_class[lead & 0x7F]
        if lead >= 0x80:
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
            for k in range(i, i + size):
                change += EACH + text[k]
            if kind == BLANK:
                blanks = True
                more = indentation(text, i + 1) if lead == 0x20 else 0
                change, i = change + (EACH + 0x20) * more, i + more
            elif not (carriage and lead == 0x0A):
                breaks += 1
            carriage = kind == CARRIAGE
            i += size
            continue
        if n > 0 and (breaks > 0 or blanks):
            between, stay = (0x0A, min(breaks, 2)) if breaks > 0 else (0x20, 1)
            out[n], out[n + 1] = between, between
            change, n = change - (EACH + between) * stay, n + stay
        breaks, blanks, carriage = 0, False, False
        for k in range(size):
            out[n + k] = text[i + k]
        plain = written(text, i + 1, out, n + 1) if size == 1 else 0
        n, i = n + size + plain, i + size + plain
    return n, dropped, change != 0


@njit(cache=True, nogil=True)
def adjacent(text: Bytes, special: Bytes, start: int) -> int:
    """Where, from `start` on, two characters stand side by side that `special`, by code point, marks with 1, or one that it marks
    with 2: the position of the last of them, or -1."""
    i, before = start, 0
    while i < len(text):
        if text[i] < 0x80:
            i += 8 if i + 8 <= len(text) and get(text, i) & HIGH == ZERO else 1
            before = 0
            continue
        size = width(text[i])
        code = code_point(text, i, size)
        mark = special[code] if code < len(special) else 0
        if mark == 2 or (mark and before):
            return i
        before = mark
        i += size
    return -1


@njit(cache=True, nogil=True)
def unsure(text: Bytes, classes: Bytes, sure: Bytes, start: int) -> int:
    """Where, from `start` on, a character stands that normalizing might change, or -1. `classes`: by code point its combining
    class, which may fall to 0 only, or 255 where it might change; beyond, by 16 code points each, `sure` has 1 for class 0."""
    i, end, before = start, len(text), 0
    while i < end:
        if i + 8 <= end and get(text, i) & HIGH == ZERO:
            i, before = i + 8, 0
        elif text[i] < 0x80:
            i, before = i + 1, 0
        else:
            size = width(text[i])
            code = code_point(text, i, size)
            kind = 255
            if code < len(classes):
                kind = classes[code]
            elif code >> 4 < len(sure) and sure[code >> 4]:
                kind = 0
            if kind == 255 or 0 < kind < before:
                return i
            i, before = i + size, kind
    return -1


@njit(cache=True, nogil=True)
def word_bounds(text: Bytes, ascii_class: Bytes, bounds: Bounds) -> int:
    """Where words begin and end, by turns; how many words there are. Words as in `kernelm_data.duplicates`. `bounds` has room for
    2 * len(text) + 2 values. Of ASCII 8 bytes at a time, and mostly without a branch."""
    n, i, end, inside = 0, 0, len(text), ZERO  # 0x80 after a letter
    while i < end:
        chunk = get(text, i) if i + 8 <= end else HIGH
        if chunk & HIGH == ZERO:
            mask = letters(chunk)
            edges = mask ^ (mask << np.uint64(8) | inside)
            inside = mask >> np.uint64(56)
            count = members(edges)
            for k in range(4):  # what is behind the last one is written over
                bounds[n + k] = i + leading(edges)
                edges &= edges - ONE
            for k in range(4, count):
                bounds[n + k] = i + leading(edges)
                edges &= edges - ONE
            n, i = n + count, i + 8
            continue
        lead = text[i]
        size, kind = 1, ascii_class[lead & 0x7F]
        if lead >= 0x80:
            size = width(lead)
            kind = wide_class(code_point(text, i, size))
        bounds[n] = i
        n += (kind == LETTER) != (inside != ZERO)
        if kind == ALONE:
            bounds[n], bounds[n + 1] = i, i + size
            n += 2
        inside = np.uint64(0x80) if kind == LETTER else ZERO
        i += size
    bounds[n] = end
    return (n + (inside != ZERO)) >> 1


@njit(cache=True, nogil=True)
def shingles(text: Bytes, bounds: Bounds, words: int, gram: int, out: Hashes) -> int:
    """The hashes of the n-grams of words in lower case, in order and with repetitions; fewer words than `gram` give one. `out` has
    room for len(text) + 1 values."""
    ring = np.zeros(32, np.uint64)  # the last words
    drop = PRIME  # what the word that leaves the n-gram has been multiplied by
    for _ in range(gram):
        drop *= PRIME
    g, n = ZERO, 0
    last = len(text) - 8
    for w in range(words):
        i, end = bounds[2 * w], bounds[2 * w + 1]
        h = ZERO
        while i < end:
            chunk = ZERO
            if i <= last:
                chunk = get(text, i)
            else:
                for k in range(len(text) - i):
                    chunk |= np.uint64(text[i + k]) << np.uint64(8 * k)
            if end - i < 8:
                chunk &= (ONE << np.uint64(8 * (end - i))) - ONE
            h = (h ^ lower(chunk)) * PRIME
            h ^= h >> SHIFT
            i += 8
        h = (h ^ h >> SHIFT) * MIX
        g = (g + h) * PRIME - ring[w - gram & 31] * drop
        ring[w & 31] = h
        if w >= gram - 1:
            x = (g ^ g >> SHIFT) * MIX
            out[n] = x ^ x >> SHIFT
            n += 1
    if n == 0:
        if words == 0:
            for byte in text:
                g = (g ^ np.uint64(byte)) * PRIME
                g ^= g >> SHIFT
        x = (g ^ g >> SHIFT) * MIX
        out[0] = x ^ x >> SHIFT
        n = 1
    return n


@njit(cache=True, nogil=True)
def sketch(grams: Hashes, a: npt.NDArray[np.uint32], b: npt.NDArray[np.uint32], out: npt.NDArray[np.uint32]) -> None:
    """MinHash: for each permutation x -> a x + b (mod 2^32, a odd) the least value over all n-grams."""
    for j in range(len(out)):
        out[j] = 0xFFFFFFFF
    for i in range(0, len(grams) - 3, 4):  # four at a time: a, b and out are read once for them
        x, y = np.uint32(grams[i] >> HALF), np.uint32(grams[i + 1] >> HALF)
        z, w = np.uint32(grams[i + 2] >> HALF), np.uint32(grams[i + 3] >> HALF)
        for j in range(len(out)):
            p, q = np.uint32(np.uint32(a[j] * x) + b[j]), np.uint32(np.uint32(a[j] * y) + b[j])
            r, s = np.uint32(np.uint32(a[j] * z) + b[j]), np.uint32(np.uint32(a[j] * w) + b[j])
            p, r = p if p < q else q, r if r < s else s
            p = p if p < r else r
            out[j] = p if p < out[j] else out[j]
    for i in range(len(grams) & ~3, len(grams)):
        x = np.uint32(grams[i] >> HALF)
        for j in range(len(out)):
            value = np.uint32(np.uint32(a[j] * x) + b[j])
            out[j] = value if value < out[j] else out[j]


@njit(cache=True, nogil=True)
def band_keys(signatures: npt.NDArray[np.uint32], band: int, rows: int, out: Hashes) -> None:
    """Of each signature the key of a band of `rows` values."""
    for i in range(len(signatures)):
        g = np.uint64(band + 1) * MIX
        for k in range(band * rows, band * rows + rows):
            g = (g ^ np.uint64(signatures[i, k])) * PRIME
            g ^= g >> SHIFT
        out[i] = g


@njit(cache=True, nogil=True)
def distinct(ordered: Hashes) -> int:
    """Bring the distinct values of a sorted array to its front; how many there are."""
    n = 0
    for i in range(len(ordered)):
        ordered[n] = ordered[i]
        n += i + 1 == len(ordered) or ordered[i] != ordered[i + 1]
    return n


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
