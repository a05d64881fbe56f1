"""National identification numbers, with the checksums of python-stdnum."""

import re
from collections.abc import Callable
from datetime import datetime
from types import ModuleType

from stdnum.au import tfn
from stdnum.be import nn
from stdnum.br import cpf
from stdnum.ca import sin
from stdnum.ch import ssn as ahv
from stdnum.cn import ric
from stdnum.de import idnr
from stdnum.es import dni, nie
from stdnum.fi import hetu
from stdnum.fr import nir
from stdnum.gb import nhs
from stdnum.in_ import aadhaar, pan
from stdnum.it import codicefiscale
from stdnum.kr import rrn
from stdnum.nl import bsn
from stdnum.pl import pesel
from stdnum.se import personnummer
from stdnum.tr import tckimlik
from stdnum.us import itin, ssn
from stdnum.za import idnr as za_idnr

from kernelm_data.private.numbers import NOT_PRIVATE, candidates
from kernelm_data.private.spans import Rule, near, whole

# HM Revenue & Customs, National Insurance Manual NIM39110: it has no checksum
NINO = r"(?!BG|GB|KN|NK|NT|TN|ZZ)[A-CEGHJ-PR-TW-Z][A-CEGHJ-NPR-TW-Z] ?\d{2} ?\d{2} ?\d{2} ?[A-D]"

CHINESE = r"[1-9]\d{5}(?:18|19|20)\d{2}(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01])\d{3}[\dXx]"


def _stdnum(module: ModuleType) -> Callable[[str], bool]:
    valid: Callable[[str], bool] = module.is_valid
    return lambda text: valid(text) and len(set(re.sub(r"\D", "", text))) > 2


def _is_chinese(text: str) -> bool:
    """GB 11643-1999: a date of birth and a checksum. Which places had a code changes over the years, and is not checked."""
    try:
        datetime.strptime(text[6:14], "%Y%m%d")
    except ValueError:
        return False
    return str(ric.calc_check_digit(text)) == text[17].upper()


def _rule(name: str, pattern: str, module: ModuleType, *context: str) -> Rule:
    # where the text must say what it is, order numbers and the like are no question
    return Rule(name, "national_id", candidates(pattern), whole(_stdnum(module)), 0.97, near(*context) if context else None,
                None if context else NOT_PRIVATE)  # fmt: skip


# a number whose form or checksum a chance number passes more often than once in a hundred needs a word before it
RULES = (
    _rule("US SSN", r"\d{3}-\d{2}-\d{4}", ssn),
    _rule("US SSN by context", r"\d{3} ?\d{2} ?\d{4}", ssn, "ssn", "social security", "social security number", "social"),
    _rule("US ITIN", r"9\d{2}-\d{2}-\d{4}", itin),
    Rule("UK NINO", "national_id", candidates(NINO), len, 0.95),
    _rule("UK NHS", r"\d{3}[ -]?\d{3}[ -]?\d{4}", nhs, "nhs"),
    _rule("DE Steuer-ID", r"[1-9]\d \d{3} \d{3} \d{3}", idnr),
    _rule("DE Steuer-ID by context", r"[1-9]\d{10}|[1-9]\d(?: \d{3}){3}", idnr, "steuer-id", "steuerid", "idnr", "tax id", "tin",
          "steuer-identifikationsnummer", "steueridentifikationsnummer", "identifikationsnummer", "steuernummer"),
    _rule("FR NIR", r"[12] ?\d{2} ?(?:0[1-9]|1[0-2]|[2-9]\d) ?(?:\d{2}|2[AB]) ?\d{3} ?\d{3} ?\d{2}", nir),
    _rule("ES DNI", r"\d{8}-?[A-HJ-NP-TV-Z]", dni),
    _rule("ES NIE", r"[XYZ]-?\d{7}-?[A-HJ-NP-TV-Z]", nie),
    _rule("IT codice fiscale", r"[A-Z]{6}[0-9LMNP-V]{2}[A-EHLMPRST][0-9LMNP-V]{2}[A-Z][0-9LMNP-V]{3}[A-Z]", codicefiscale),
    Rule("CN resident id", "national_id", candidates(CHINESE), whole(_is_chinese), 0.99, unless=NOT_PRIVATE),
    _rule("NL BSN", r"\d{9}|\d{4}\.\d{2}\.\d{3}", bsn, "bsn", "burgerservicenummer", "sofinummer"),
    _rule("PL PESEL", r"\d{11}", pesel, "pesel"),
    _rule("BR CPF", r"\d{3}\.\d{3}\.\d{3}-\d{2}", cpf),
    _rule("BR CPF by context", r"\d{11}", cpf, "cpf"),
    _rule("IN Aadhaar", r"(?<!\d )[2-9]\d{3} \d{4} \d{4}(?! \d)", aadhaar),
    _rule("IN Aadhaar by context", r"[2-9]\d{11}", aadhaar, "aadhaar", "uidai"),
    _rule("IN PAN", r"[A-Z]{3}[ABCFGHLJPT][A-Z]\d{4}[A-Z]", pan),
    _rule("CA SIN", r"\d{3}[ -]?\d{3}[ -]?\d{3}", sin, "sin", "social insurance", "social insurance number", "nas"),
    _rule("SE personnummer", r"\d{6}(?:\d{2})?[-+]\d{4}", personnummer),
    _rule("CH AHV", r"756\.\d{4}\.\d{4}\.\d{2}", ahv),
    _rule("BE national number", r"\d{2}\.\d{2}\.\d{2}-\d{3}\.\d{2}", nn),
    _rule("KR RRN", r"\d{6}-[1-8]\d{6}", rrn),
    _rule("TR kimlik", r"[1-9]\d{10}", tckimlik, "tc", "kimlik", "kimlik no", "tckn"),
    _rule("ZA ID", r"\d{13}|\d{6} \d{4} \d{3}", za_idnr, "id", "identity number", "id number", "id no"),
    _rule("FI HETU", r"\d{6}[-+A]\d{3}[0-9A-FHJ-NPR-Y]", hetu),
    _rule("AU TFN", r"\d{3} ?\d{3} ?\d{2,3}", tfn, "tfn", "tax file number", "tax file"),
)  # fmt: skip
