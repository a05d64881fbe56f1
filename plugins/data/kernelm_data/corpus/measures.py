"""What the quality rules measure in a text: words, lines, repetitions. Compiled by Numba, over UTF-8 in arrays of bytes.

A word is what stands between blanks, and each character of a script without blanks; a line is what is not blank between newlines.
Lengths are in characters.
"""

import numpy as np
import numpy.typing as npt
from numba import njit

from kernelm_data.corpus.kernels import (
    ALONE,
    BLANK,
    BREAK,
    CARRIAGE,
    LETTER,
    MIX,
    PRIME,
    SHIFT,
    ZERO,
    Bytes,
    Hashes,
    code_point,
    wide_class,
    width,
)

Lengths = npt.NDArray[np.int32]

STOP_WORDS = ("the", "be", "to", "of", "and", "that", "have", "with")  # Rae et al., 2021, appendix A.1.1

# positions in the array of measures
(CHARACTERS, WORDS, WORD_CHARACTERS, ALPHABETIC, STOPS, HASHES, ELLIPSES, LINES, BULLETS, ELLIPSIS_ENDS, PUNCTUATED, SHORT,
 NEWLINES, LINE_CHARACTERS, LONGEST) = range(15)  # fmt: skip
MEASURES = 15
SHORT_LINE = 30  # characters; Penedo et al., "The FineWeb datasets", 2024, section 3.5


def word_hash(word: str) -> int:
    """The hash that `scan` gives a word."""
    h, full = 0, (1 << 64) - 1
    for byte in word.encode():
        h = ((h ^ byte) * int(PRIME)) & full
        h ^= h >> int(SHIFT)
    return h


STOP_HASHES = np.array([word_hash(word) for word in STOP_WORDS], np.uint64)


@njit(cache=True, inline="always")
def _ends_sentence(code: int) -> bool:
    # . ! ? " and their forms in other scripts
    return (
        code == 0x2E
        or code == 0x21
        or code == 0x3F
        or code == 0x22
        or code == 0x201D
        or code == 0x3002
        or code == 0xFF01
        or code == 0xFF1F
        or code == 0x2026
    )


@njit(cache=True, inline="always")
def _is_bullet(code: int) -> bool:
    return (
        code == 0x2D
        or code == 0x2A
        or code == 0x2022
        or code == 0x25CF
        or code == 0x2023
        or code == 0x2043
        or code == 0x25E6
        or code == 0x2219
        or code == 0x25A0
        or code == 0x25AA
        or code == 0x2013
    )


@njit(cache=True)
def _end_word(out: npt.NDArray[np.int64], h: np.uint64, length: int, alphabetic: bool, stops: Hashes) -> int:
    """Count a word; a bit for the stop word that it is."""
    out[WORD_CHARACTERS] += length
    out[LONGEST] = max(out[LONGEST], length)
    out[ALPHABETIC] += alphabetic
    bit = 0
    if length <= 4:
        for s in range(len(stops)):
            if h == stops[s]:
                bit = 1 << s
    return bit


@njit(cache=True)
def _end_line(out: npt.NDArray[np.int64], length: int, first: int, last: int, dots: int) -> None:
    """Count a line by its length, its first and last character, and the dots at its end."""
    out[LINE_CHARACTERS] += length
    out[BULLETS] += _is_bullet(first)
    out[PUNCTUATED] += _ends_sentence(last)
    out[ELLIPSIS_ENDS] += last == 0x2026 or dots >= 3
    out[SHORT] += length <= SHORT_LINE


@njit(cache=True, nogil=True)
def scan(text: Bytes, ascii_class: Bytes, stops: Hashes, words: Hashes, word_lengths: Lengths, lines: Hashes,
         line_lengths: Lengths, out: npt.NDArray[np.int64]) -> None:  # fmt: skip
    """Measure a text into `out`, its words and lines into the arrays, which have room for len(text) + 1 values."""
    out[:] = 0
    i, n_words, n_lines, seen = 0, 0, 0, 0
    h, length, alphabetic = ZERO, 0, False
    line, line_length, first, last, before = ZERO, 0, 0, 0, 0
    end, dots, trailing = len(text), 0, 0  # trailing: blanks that a line may end with
    while i <= end:
        kind, size, code = BREAK, 1, 0x0A
        if i < end:
            code = text[i]
            if code < 0x80:
                kind = ascii_class[code]
            else:
                size = width(code)
                code = code_point(text, i, size)
                kind = wide_class(code)
            out[CHARACTERS] += 1
        gap = (kind == BLANK) | (kind == BREAK) | (kind == CARRIAGE)
        if (gap or kind == ALONE) and length:
            words[n_words], word_lengths[n_words] = h, length
            n_words += 1
            seen |= _end_word(out, h, length, alphabetic, stops)
            h, length, alphabetic = ZERO, 0, False
        if kind == BREAK:
            if line_length:
                lines[n_lines], line_lengths[n_lines] = line, line_length
                n_lines += 1
                _end_line(out, line_length, first, last, before)
            line, line_length, trailing, dots = ZERO, 0, 0, 0
            out[NEWLINES] += i < end
        elif gap:
            trailing += 1
        else:
            if line_length == 0:
                first, trailing = code, 0
            line_length += 1 + trailing
            trailing, last = 0, code
            before = dots = dots + 1 if code == 0x2E else 0
            out[ELLIPSES] += dots == 3 or code == 0x2026
            out[HASHES] += code == 0x23
            for k in range(size):
                byte = np.uint64(text[i + k])
                h = (h ^ byte) * PRIME
                h ^= h >> SHIFT
                line = (line ^ byte) * MIX
                line ^= line >> SHIFT
            length += 1
            alphabetic |= kind == ALONE or (kind == LETTER and not 0x30 <= code <= 0x39 and code != 0x5F)
            if kind == ALONE:
                words[n_words], word_lengths[n_words] = h, length
                n_words += 1
                seen |= _end_word(out, h, length, alphabetic, stops)
                h, length, alphabetic = ZERO, 0, False
        i += size
    for s in range(len(stops)):
        out[STOPS] += seen >> s & 1
    out[WORDS], out[LINES] = n_words, n_lines


@njit(cache=True, nogil=True)
def _slot(table: Hashes, h: np.uint64) -> np.uint64:
    """Where `h` stands in the open-addressed `table`, or belongs."""
    mask = np.uint64(len(table) - 1)
    slot = (h >> SHIFT) & mask
    while table[slot] != ZERO and table[slot] != h:
        slot = (slot + np.uint64(1)) & mask
    return slot


@njit(cache=True, nogil=True)
def _gram(words: Hashes, lengths: Lengths, i: int, n: int) -> tuple[np.uint64, int]:
    """Hash of the n words from the i-th on, never zero, and their characters."""
    h, length = ZERO, 0
    for k in range(i, i + n):
        h = (h ^ words[k]) * PRIME
        h ^= h >> SHIFT
        length += lengths[k]
    return h | np.uint64(1), length


@njit(cache=True, nogil=True)
def repeated(hashes: Hashes, lengths: Lengths, table: Hashes) -> tuple[int, int]:
    """How many of the items were there before, and how many characters they have. `table`: room for twice as many, a power of
    two."""
    table[:] = 0
    count, characters = 0, 0
    for i in range(len(hashes)):
        h = hashes[i] | np.uint64(1)
        slot = _slot(table, h)
        if table[slot] == h:
            count += 1
            characters += lengths[i]
        table[slot] = h
    return count, characters


@njit(cache=True, nogil=True)
def top_gram(words: Hashes, lengths: Lengths, n: int, table: Hashes, counts: Lengths) -> int:
    """Characters that the most frequent n-gram of words covers, if it is there more than once."""
    table[:] = 0
    best, characters = 1, 0
    for i in range(len(words) - n + 1):
        h, length = _gram(words, lengths, i, n)
        slot = _slot(table, h)
        if table[slot] == ZERO:
            table[slot] = h
            counts[slot] = 0
        counts[slot] += 1
        if counts[slot] > best:
            best, characters = counts[slot], counts[slot] * (length + n - 1)  # with the blanks between
    return characters


@njit(cache=True, nogil=True)
def repeated_grams(words: Hashes, lengths: Lengths, n: int, table: Hashes) -> int:
    """Characters in n-grams of words that were there before, none counted twice."""
    table[:] = 0
    characters, i = 0, 0
    while i + n <= len(words):
        h, length = _gram(words, lengths, i, n)
        slot = _slot(table, h)
        if table[slot] == h:
            characters += length
            i += n
        else:
            table[slot] = h
            i += 1
    return characters


@njit(cache=True, nogil=True)
def paragraph_hashes(text: Bytes, hashes: Hashes, lengths: Lengths) -> int:
    """Hash and length of each paragraph; returns how many there are. Paragraphs are what empty lines part."""
    n, i, end = 0, 0, len(text)
    h, length = ZERO, 0
    while i <= end:
        parted = i == end or (text[i] == 0x0A and i + 1 < end and text[i + 1] == 0x0A)
        if parted:
            if length:
                hashes[n], lengths[n] = h, length
                n += 1
            h, length = ZERO, 0
            while i < end and text[i] == 0x0A:
                i += 1
            if i == end:
                break
            continue
        h = (h ^ np.uint64(text[i])) * PRIME
        h ^= h >> SHIFT
        length += text[i] & 0xC0 != 0x80
        i += 1
    return n


@njit(cache=True, nogil=True)
def sentence_lines(text: Bytes, ascii_class: Bytes, min_words: int, out: Bytes) -> tuple[int, int, int]:
    """Write the lines that end in a terminal punctuation mark, no ellipsis, and have `min_words` words or more: bytes written,
    sentences in them, lines left out."""
    n, i, end, sentences, left_out = 0, 0, len(text), 0, 0
    while i < end:
        stop = i
        words, inside, here, last, dots = 0, False, 0, 0, 0
        while stop < end and text[stop] != 0x0A:
            lead = text[stop]
            size = width(lead)
            code = lead if size == 1 else code_point(text, stop, size)
            kind = ascii_class[lead] if size == 1 else wide_class(code)
            gap = kind == BLANK
            words += (not gap and not inside) or kind == ALONE
            inside = not gap and kind != ALONE
            if not gap:
                here += _ends_sentence(code) and not _ends_sentence(last)
                last = code
                dots = dots + 1 if code == 0x2E else 0
            stop += size
        if words >= min_words and _ends_sentence(last) and dots < 3 and last != 0x2026:
            if n:
                out[n] = 0x0A
                n += 1
            for k in range(i, stop):
                out[n] = text[k]
                n += 1
            sentences += here
        elif stop > i:
            left_out += 1
        i = stop + 1
    return n, sentences, left_out
