"""What the compiled cleaning takes for granted: runs of eight bytes, and the characters that NFC leaves alone."""

import random
import unicodedata

import numpy as np
import pytest

from kernelm_contracts.data import Clean
from kernelm_data.clean import cleaner as reference_cleaner
from kernelm_data.corpus.cleaning import CLASSES, SURE, UNSURE, as_steps, cleaner, normalize
from kernelm_data.corpus.kernels import ASCII, word_bounds
from kernelm_data.duplicates import WORD

RUNS = (" " * 17, "\n" + " " * 8, "\n\n" + " " * 12, "\n \n")
ODD = ("\t", "\r\n", "\x7f", "\x1f", "\x00", "\u00e9", "\u00a0", "\u2028", "\u4e2d")
PIECES = (*"aZ~!", " ", " ", "\n", "  ", "\n\n\n", *RUNS, *ODD)
HANGUL_VOWELS, HANGUL_FINALS = range(0x1161, 0x1176), range(0x11A8, 0x11C3)  # composed by rule (Unicode, section 3.12)


@pytest.mark.parametrize("fields", [{}, {"drop_control": False}, {"collapse_whitespace": False}])
def test_runs_of_eight_bytes_are_tidied_as_single_ones(fields):
    dice, settings = random.Random(8), Clean(**fields)
    ours, reference = cleaner(as_steps(settings)), reference_cleaner(settings)
    for _ in range(6_000):
        rare = dice.random()
        size = dice.randrange(48)
        text = "".join(dice.choice(PIECES) if dice.random() < rare else dice.choice("word") for _ in range(size))
        cleaned, changes = ours(text.encode())
        assert (cleaned.decode(), changes) == reference(text)


def test_words_are_found_eight_bytes_at_a_time_as_by_the_expression():
    dice, characters = random.Random(5), [*map(chr, range(128)), *"\u00e9\u4e2d\u306e\u0e01\u2028\u2190" * 4]
    for _ in range(3_000):
        rare = dice.random()
        text = "".join(dice.choice(characters) if dice.random() < rare else dice.choice("word ") for _ in range(dice.randrange(40)))
        data = text.encode()
        bounds = np.empty(2 * len(data) + 2, np.int64)
        words = word_bounds(np.frombuffer(data, np.uint8), ASCII, bounds)
        assert [data[bounds[2 * w] : bounds[2 * w + 1]].decode() for w in range(words)] == WORD.findall(text)


@pytest.mark.parametrize("size", [65_520, 65_527, 65_528, 65_529, 65_535, 65_536, 65_544])
def test_a_text_as_long_as_the_room_for_it(size):
    cleaned, _ = cleaner(as_steps(Clean()))(b"ab  " * (size // 4) + b"c" * (size % 4))
    assert cleaned == (b"ab " * (size // 4) + b"c" * (size % 4)).rstrip()


def test_characters_taken_for_normalized_are_so_beside_any_other():
    follows = {*HANGUL_VOWELS, *HANGUL_FINALS}  # what goes together with a character before it
    for code in range(0x110000):
        parts = unicodedata.decomposition(chr(code)).split()
        composed = unicodedata.is_normalized("NFC", chr(code))  # of all others the parts stay apart
        if len(parts) == 2 and not parts[0].startswith("<") and composed:
            follows.add(int(parts[1], 16))
    assert not SURE[: len(CLASSES) // 16].any()
    beyond = {16 * int(block) + low: 0 for block in np.flatnonzero(SURE) for low in range(16)}
    for code, kind in ({code: int(kind) for code, kind in enumerate(CLASSES) if kind != UNSURE} | beyond).items():
        assert code not in follows, hex(code)
        assert unicodedata.combining(chr(code)) == kind, hex(code)
        assert unicodedata.normalize("NFC", chr(code)) == chr(code), hex(code)


@pytest.mark.parametrize("form", ["NFC", "NFD", "NFKC", "NFKD"])
def test_normalizing_line_by_line_is_normalizing_all(form):
    dice, step = random.Random(9), normalize(form)
    marks = "\u0301\u0327\u0591\u05b0"
    pieces = marks + "a e\u00e9\u1e69s\u0323\u0307\n\r\u212b\ufb01\uac00\u11a8\u1100\u1161\u0928\u093c\u4e2d\U0001d15e\U0001f600"
    for _ in range(4_000):
        text = "".join(dice.choice(pieces) for _ in range(dice.randrange(24)))
        assert step(text.encode()).decode() == unicodedata.normalize(form, text)
