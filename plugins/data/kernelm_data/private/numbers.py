"""Payment cards, bank accounts and phone numbers: candidates are runs of digits, and a checksum or a numbering plan decides."""

import re
from functools import cache

import phonenumbers
from stdnum import iban as stdnum_iban
from stdnum import luhn, numdb

from kernelm_data.private.spans import Rule, longest, near, whole

# a candidate starts where no longer number, word, decimal fraction, path or hyphenated code is under way, and ends likewise
BEFORE = r"(?<![0-9A-Za-z_#+])(?<![0-9A-Za-z][-./_+,:=@])(?<!\d[)])"
AFTER = r"(?![0-9A-Za-z_])(?![-.,/:@+_]\d)(?!-[A-Za-z])"


def candidates(pattern: str) -> re.Pattern[str]:
    """Every place where `pattern` fits as a number of its own, overlapping ones too: a wrong start must not hide a right one."""
    return re.compile(rf"{BEFORE}(?=({pattern}){AFTER})")


NOT_PRIVATE = re.compile(
    r"(?i)(?:\b(?:isbn|issn|doi|ean|upc|sku|order|orders|ref|reference|invoice|ticket|serial|tracking|shipment|parcel|batch|lot"
    r"|case|transaction|build|version|revision|commit|timestamp|model|part|item|article|patent|grant|job|port|row)\b"
    r"|订单|编号|流水号|单号|批号|版本|货号)[^\n\d]{0,14}\Z"
)

NOT_A_PHONE = re.compile(rf"{NOT_PRIVATE.pattern}|(?-i:\b[A-Z]{{2}})\s{{1,2}}\Z")  # MA 02110-1301: a ZIP code

CARD = near("card", "credit", "debit", "visa", "mastercard", "maestro", "pan", "karte", "carte", "tarjeta",
            "银行卡", "卡号", "信用卡")  # fmt: skip

# issuer ranges: first digits -> lengths (ISO/IEC 7812-1; the networks' published ranges)
ISSUERS = (
    (range(4, 5), (16, 19)),  # Visa
    (range(51, 56), (16,)),  # Mastercard
    (range(2221, 2721), (16,)),
    (range(34, 35), (15,)),  # American Express
    (range(37, 38), (15,)),
    (range(6011, 6012), (16, 19)),  # Discover
    (range(644, 660), (16, 19)),
    (range(300, 306), (14, 16)),  # Diners Club
    (range(36, 37), (14, 16)),
    (range(38, 40), (14, 16)),
    (range(35, 36), (16, 19)),  # JCB
    (range(62, 63), (16, 17, 18, 19)),  # UnionPay
    (range(2200, 2205), (16,)),  # Mir
)


def _digits(text: str) -> str:
    return re.sub(r"\D", "", text)


def is_card(text: str) -> bool:
    """Luhn's checksum, the issuer's range and length, and not one digit repeated."""
    number = _digits(text)
    separators = set(re.sub(r"\d", "", text))
    if len(separators) > 1 or len(set(number)) < 2 or not luhn.is_valid(number):
        return False
    return any(len(number) in lengths and int(number[: len(str(prefixes.start))]) in prefixes for prefixes, lengths in ISSUERS)


def is_card_by_context(text: str) -> bool:
    """Luhn's checksum alone, for what the text calls a card: Maestro has nearly every length and prefix."""
    number = _digits(text)
    return 12 <= len(number) <= 19 and len(set(number)) > 1 and luhn.is_valid(number)


@cache
def _iban_length(country: str) -> int:
    """Characters of an IBAN of this country; 0 if it has none."""
    parts = numdb.get("iban").info(country)
    bban = parts[0][1].get("bban", "")
    return 4 + sum(int(n) for n in re.findall(r"(\d+)!", bban)) if bban else 0


def iban_end(text: str) -> int:
    """Where the IBAN that starts `text` ends; 0 if there is none. What follows in the next group is not part of it."""
    length = _iban_length(text[:2])
    taken = 0
    for i, character in enumerate(text):
        taken += character.isalnum()
        if taken == length:
            return i + 1 if not text[i + 1 : i + 2].isalnum() and stdnum_iban.is_valid(text[: i + 1]) else 0
    return 0


PHONE = near(
    "tel", "phone", "telephone", "mobile", "mob", "cell", "fax", "whatsapp", "sms", "hotline", "handy", "mobil", "telefon",
    "telefonnummer", "tél", "téléphone", "móvil", "teléfono", "telefono", "cellulare", "telefone", "telefoonnummer",
    "电话", "手机", "联系方式", "致电", "传真", "热线", "座机", "電話", "手機", "携帯", "전화", "тел",
)  # fmt: skip
CALL = near("call", "calling", "ring", "dial", "text", "reach", "portable", "contact", "拨打", "联系", within=12)
# where a number without country code may belong; the more, the more chance finds
REGIONS = ("US", "GB", "DE", "FR", "IT", "ES", "NL", "BE", "CH", "AT", "PL", "SE", "IE", "PT", "IN", "AU", "JP", "KR", "CN", "TW",
           "HK", "BR", "MX", "TR", "ZA", "DK", "NO")  # fmt: skip
LEADING_ZERO = ("GB", "DE", "FR", "IT", "NL", "BE", "CH", "AT", "SE", "IE", "IN", "AU", "JP", "KR", "CN", "TW", "TR", "ZA")
DATE = re.compile(r"[0-3]?\d([./ -])[0-3]?\d\1(?:19|20)?\d{2}(?![./ -]?\d)|(?:19|20)\d{2}[./ -]\d{1,2}(?:[./ -]\d{1,2}(?!\d)|$)")
COMPACT_DATE = re.compile(r"(?:19|20)\d{2}(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01])(?:\d{4}|\d{6})?$")
YEARS = re.compile(r"(?:19|20)\d\d[ /-]+(?:19|20)\d\d")


def _valid(text: str, *regions: str | None) -> bool:
    for region in regions:
        try:
            if phonenumbers.is_valid_number(phonenumbers.parse(text, region)):
                return True
        except phonenumbers.NumberParseException:
            continue
    return False


def _dated(text: str) -> bool:
    return any(form.match(text) for form in (DATE, COMPACT_DATE, YEARS)) or len(set(_digits(text))) < 3


def is_international(text: str) -> bool:
    return _valid("+" + text[2:] if text.startswith("00") else text, None)


def is_american(text: str) -> bool:
    return not _dated(text) and _valid(text, "US")


def is_national(text: str) -> bool:
    grouped = len(_digits(text)) >= 9 or not text.replace(" ", "").isdigit()  # two numbers of 4 digits are seldom one of 8
    return grouped and not _dated(text) and text.count("(") == text.count(")") and _valid(text, *LEADING_ZERO)


def is_called(text: str) -> bool:
    """A number that the text calls a phone number."""
    return not _dated(text) and text.count("(") == text.count(")") and _valid(text, *REGIONS)


def is_chinese_mobile(text: str) -> bool:
    return _valid(text, "CN")


SEPARATOR = r"(?:[ \u00a0.\-/]|[)][ \-/]?|[ ]?[(]| [-\u2013/] )?"
AMERICAN = r"(?:1[ .-])?(?:\([2-9]\d{2}\) ?[2-9]\d{2}[ .-]\d{4}|[2-9]\d{2}(?:-[2-9]\d{2}-|\.[2-9]\d{2}\.)\d{4})"
ZERO = r"(?<!\d )\(?0\d{1,5}\)?[ \u00a0./-]{1,2}\d{2,8}(?:[ \u00a0./-]\d{1,8}){0,5}"
CALLED = rf"\(?\d(?:{SEPARATOR}\d){{6,13}}"
CHINESE_MOBILE = r"1[3-9]\d(?:[ -]?\d{4}){2}"
MAESTRO = r"\d{4}(?:[ -]?\d{1,4}){2,4}|\d{12,19}"
CARD_NUMBER = r"\d{4}(?:[ -]?\d{4}){2}[ -]?\d{4}(?:[ -]?\d{1,3})?|\d{14,19}|\d{4}[ -]\d{6}[ -]\d{4,5}"


def international(start: str) -> re.Pattern[str]:
    return re.compile(rf"(?<![0-9A-Za-z+])(?=({start}[1-9](?:{SEPARATOR}\d){{6,14}})(?!\d))")


RULES = (
    Rule("card", "card", candidates(CARD_NUMBER), longest(is_card), 0.99, unless=NOT_PRIVATE),
    Rule("card by context", "card", candidates(MAESTRO), longest(is_card_by_context), 0.95, context=CARD),
    Rule("phone, Chinese mobile", "phone", candidates(CHINESE_MOBILE), whole(is_chinese_mobile), 0.95, unless=NOT_PRIVATE),
    Rule("phone, North American", "phone", candidates(AMERICAN), whole(is_american), 0.95, unless=NOT_PRIVATE),
    Rule("phone, leading zero", "phone", candidates(ZERO), longest(is_national), 0.9, unless=NOT_A_PHONE),
    Rule("phone by context", "phone", candidates(CALLED), longest(is_called), 0.9, context=PHONE, unless=NOT_PRIVATE),
    Rule("phone to call", "phone", candidates(CALLED), longest(is_called), 0.9, context=CALL, unless=NOT_PRIVATE),
)  # fmt: skip
INTERNATIONAL = (
    Rule("phone, international", "phone", international(r"\+"), longest(is_international), 0.98),
    Rule("phone, 00", "phone", international("00"), longest(is_international), 0.9, unless=NOT_PRIVATE),
)
IBAN = Rule("IBAN", "iban", re.compile(r"(?<![0-9A-Za-z])(?=([A-Z]{2}\d{2}(?: ?[A-Z0-9]{1,4}){3,10}))"), iban_end, 1.0)
