"""A redacted stream equals the redacted whole, wherever it is cut, and little is held back."""

import itertools
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernelm_data.private import Detector, Placeholders, Redactor, redact
from kernelm_data.private.redact import STYLES

DETECTOR = Detector()
PEM = (
    "-----BEGIN RSA PRIVATE KEY-----\nMIIEpAIBAAKCAQEA1234567890abcdefghijABCDEFGHIJKLMNOP\n"
    "abcdEFGH12==\n-----END RSA PRIVATE KEY-----"
)
PIECES = (
    "The",
    " ",
    "  ",
    "\n",
    "\n\n",
    "\t",
    ", ",
    ". ",
    "capital of France is Paris",
    "john.smith@example.co.uk",
    "a@",
    "@",
    ".",
    "-",
    "(",
    "+49 30 901820",
    "(212) 555-0123",
    "030/1234567",
    "tel: 555 123 4567",
    "call me at ",
    "4111 1111 1111 1111",
    "123",
    "4111-1111-1111-1111",
    "DE89 3704 0044 0532 0130 00",
    "GB82 WEST 1234 5698 7654 32",
    "SSN 536-90-4399",
    "AB 12 34 56 C",
    "86095742719",
    "Steuer-ID ",
    "BSN: ",
    "8.8.8.8",
    "93.184.216.34",
    "version 4.2.1.5",
    "2001:4860:4860::8888",
    "AKIAIOSFODNN7EXAMPLE",
    "ghp_16C7e42F292c6912E7710c838347Ae178B4a",
    "password = ",
    "hunter2Xy9!",
    'secret="Abc12345xyz"',
    "https://bob:s3cr3tpw@db.example.com/x",
    PEM,
    PEM[:70],
    "-----BEGIN ",
    "PRIVATE KEY-----",
    "北京的",
    "电话",
    "\uff1a",
    "13812345678",
    "\uff11\uff13\uff18\uff11\uff12\uff13\uff14\uff15\uff16\uff17\uff18",
    "身份证号110101199003077758",
    "\uff0c",
    "密码是",
    "order no. ",
    "ISBN 978-3-16-148410-0",
    "2024-01-15",
    "12:30:45",
    "USA",
    "I",
    "00",
    "0",
    "1",
)
TEXTS = st.one_of(
    st.lists(st.sampled_from(PIECES), max_size=14).map("".join),
    st.lists(st.sampled_from(PIECES), max_size=14).map(" ".join),
    st.text(max_size=40),
    st.text(alphabet="0123456789 +-()./@:aAB=\n电", max_size=80),
)


def stream(text: str, cuts: list[int], redactor: Redactor) -> str:
    places = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})
    return "".join(redactor.feed(text[a:b]) for a, b in itertools.pairwise(places)) + redactor.close()


@given(TEXTS, st.lists(st.integers(0, 10_000), max_size=20))
@settings(max_examples=600, deadline=None)
def test_any_cut_gives_the_same(text: str, cuts: list[int]):
    assert stream(text, cuts, Redactor(DETECTOR)) == redact(text, DETECTOR.detect(text))


@given(TEXTS)
@settings(max_examples=200, deadline=None)
def test_one_character_at_a_time_gives_the_same_numbers(text: str):
    redactor = Redactor(DETECTOR, Placeholders("number"))
    assert stream(text, list(range(len(text))), redactor) == redact(text, DETECTOR.detect(text), "number")


@pytest.mark.parametrize("style", STYLES)
def test_placeholders_are_not_found_again(style):
    text = 'a@b.org, +49 30 901820, 4111 1111 1111 1111, 93.184.216.34, password = "hunter2Xy9!" token=abc123DEF456 SSN 536-90-4399'
    once = redact(text, DETECTOR.detect(text), style, key=b"0123456789abcdef")
    assert len(DETECTOR.detect(text)) == 7
    assert DETECTOR.detect(once) == []


@pytest.mark.parametrize("style", ["type", "number"])
@pytest.mark.parametrize("step", [1, 7, 97, 4096])
def test_a_line_of_numbers_without_end(style, step):
    numbers = [
        "4111 1111 1111 1111",
        "12 34 56",
        "93.184.216.34",
        "0301234567",
        "+49 30 901820",
        "7",
        "GB82 WEST 1234 5698 7654 32",
    ]
    text = " ".join(numbers[(n * n + n // 3) % len(numbers)] for n in range(3000))
    redactor, parts, most = Redactor(DETECTOR, Placeholders(style)), [], 0
    for at in range(0, len(text), max(step, 61)):  # smaller steps would take a minute: 16,384 characters are read again each time
        for k in range(at, min(at + max(step, 61), len(text)), max(step, 61)):
            parts.append(redactor.feed(text[k : k + max(step, 61)]))
        most = max(most, redactor.held)
    assert "".join(parts) + redactor.close() == redact(text, DETECTOR.detect(text), style)
    assert most <= Redactor.LIMIT


def test_text_that_has_no_utf8():
    text = "\ud800 write to jane@example.org \udfff"
    assert redact(text, DETECTOR.detect(text)) == stream(text, [9, 20], Redactor(DETECTOR)) == "\ud800 write to [EMAIL] \udfff"


def test_prose_is_held_back_by_a_word_only():
    redactor = Redactor(DETECTOR)
    text = "The capital of France is Paris, where the river Seine flows. " * 5
    given_out = ""
    for character in text:
        given_out += redactor.feed(character)
        assert redactor.held <= len("France ")
    assert given_out + redactor.close() == text
    chinese = "法国的首都是巴黎\uff0c塞纳河从那里流过。"
    assert redactor.feed(chinese) == chinese


def test_a_number_is_held_back_until_it_ends():
    redactor = Redactor(DETECTOR)
    assert redactor.feed("Pay to 4111 1111 1111") == "Pay to "
    assert redactor.feed(" 1111 by") == ""
    assert redactor.feed(" Friday") == "[CARD] by "
    assert redactor.close() == "Friday"
    assert redactor.found == {"card": 1}


def test_a_key_is_not_given_out_while_it_is_written():
    redactor = Redactor(DETECTOR)
    given_out = "".join(redactor.feed(c) for c in f"Here it is: {PEM}\nKeep it safe, and ")
    assert given_out + redactor.close() == "Here it is: [SECRET]\nKeep it safe, and "
    cut_off = PEM[:80]
    assert redactor.feed(cut_off) == ""
    assert redactor.close() == "[SECRET]"


def test_a_hostile_line_stays_fast():
    """Nothing here may take time that grows with the square of the text."""
    for text in (
        "1" * 200_000,
        "1 " * 100_000,
        "a@" * 100_000,
        "-----BEGIN " * 20_000,
        "eyJ" * 60_000,
        "(" * 200_000,
        "AB12 " * 40_000,
        "password=" * 20_000,
        "1.1.1.1." * 25_000,
        "a." * 100_000 + "@",
        "2001:" * 40_000,
        "://a:" * 40_000,
    ):
        started = time.process_time()
        DETECTOR.detect(text)
        assert time.process_time() - started < 5, text[:20]  # seconds of processor time; 0.1 to 1.5 measured
