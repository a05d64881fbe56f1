# ruff: noqa: RUF001 - other scripts are the subject here
"""Decoding and cleaning one text, and its n-grams."""

import pytest

from kernelm_contracts.data import Clean
from kernelm_data.clean import cleaner, collapse_whitespace
from kernelm_data.decode import Undecodable, decode
from kernelm_data.duplicates import bands, grams

RUSSIAN = "Президент России подписал указ о развитии цифровой экономики, сообщила пресс-служба. Документ вступает в силу сегодня."
JAPANESE = "総理大臣は本日、新しい経済政策を発表しました。この政策は来年四月から実施される予定です。"
CHINESE = "国务院总理今天在北京宣布了新的经济政策，该政策将于明年四月开始实施。"
FRENCH = "Le président a annoncé une réforme générale à l'Assemblée; les députés étaient préoccupés. C’est très coûteux: 15 €."
POLISH = "Prezydent ogłosił wczoraj nową ustawę o ochronie środowiska, która wejdzie w życie w przyszłym roku."
GREEK = "Ο πρωθυπουργός ανακοίνωσε σήμερα νέα μέτρα για την οικονομία της χώρας."


@pytest.mark.parametrize(("text", "encoding"), [
    (RUSSIAN, "cp1251"), (RUSSIAN, "koi8-r"), (JAPANESE, "shift_jis"), (JAPANESE, "euc-jp"), (CHINESE, "gb18030"),
    (FRENCH, "cp1252"), (POLISH, "cp1250"), (POLISH, "iso8859-2"), (GREEK, "cp1253"),
    (FRENCH, "utf-8"), (FRENCH, "utf-8-sig"), (FRENCH, "utf-16"), (GREEK, "utf-32"), (FRENCH, "utf-16-le"),
])  # fmt: skip
def test_decodes_what_is_in_use(text, encoding):
    assert decode(text.encode(encoding))[0] == text


def test_pound_sign_of_the_corpus(news):
    text, encoding = decode((news / "sports" / "199.txt").read_bytes())
    assert encoding == "cp1252"
    assert "a £15.8m signing" in text


@pytest.mark.parametrize(("data", "reason"), [
    (b"MZ\x90\0\3\0\0\0" + bytes(range(256)), "binary"),
    (bytes(range(1, 32)) * 20, "binary"),
    (FRENCH.encode()[:30] + b"\xc3" + FRENCH.encode()[30:], "broken utf-8"),
    (FRENCH.encode("utf-16")[:-1], "broken utf-16"),
    (b"\xef\xbb\xbf" + FRENCH.encode("cp1252"), "broken utf-8-sig"),
])  # fmt: skip
def test_refuses_what_is_no_text(data, reason):
    with pytest.raises(Undecodable) as caught:
        decode(data)
    assert caught.value.reason == reason


def test_empty_file_is_an_empty_text():
    assert decode(b"") == ("", "utf-8")


@pytest.mark.parametrize(("dirty", "clean", "change"), [
    ("The cafÃ© on the corner", "The café on the corner", "mojibake fixed"),
    ("cafe\u0301", "café", "brought to NFC"),
    ("a\x00b\u200bc\u202ed", "abcd", "control characters dropped"),
    ("a \t b\u00a0c\r\n\r\n\r\n\r\n d\x0be ", "a b c\n\nd\ne", "whitespace collapsed"),
])  # fmt: skip
def test_cleans(dirty, clean, change):
    text, changes = cleaner(Clean())(dirty)
    assert text == clean
    assert change in changes
    assert cleaner(Clean())(text) == (text, [])


def test_leaves_what_the_author_wrote():
    text = "“Quoted”, 5 &amp; 6, ﬁne, ＦＵＬＬ, 👩\u200d🔬, می\u200cخواهم"
    assert cleaner(Clean())(text) == (text, [])


def test_every_part_of_cleaning_can_be_off():
    off = Clean(fix_mojibake=False, normalize="", drop_control=False, collapse_whitespace=False)
    text = "cafÃ©  e\u0301 \u200b \r\n"
    assert cleaner(off)(text) == (text, [])


def test_whitespace_keeps_paragraphs():
    assert collapse_whitespace("One.\n\nTwo.\nThree.") == "One.\n\nTwo.\nThree."


def test_grams():
    assert grams("The cat, the DOG and a bird!") == ["the cat the dog and", "cat the dog and a", "the dog and a bird"]
    assert grams("Two words") == ["two words"]
    assert grams("!?") == ["!?"]
    assert len(grams(CHINESE)) > 20


def test_bands_follow_the_formula():
    assert bands(0.8, 128) == 32
    for threshold in (0.5, 0.8, 0.95):
        count = bands(threshold, 128)
        rows = 128 // count
        assert (1 - threshold**rows) ** count <= 1e-4
