"""Keys, tokens and passwords: the prefixes that issuers publish, and what a text assigns to a name that says it is secret.

The list of issuers follows detect-secrets 1.5 and the issuers' documentation of secret scanning.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator

import re2

from kernelm_data.private.spans import Span

BEFORE = r"(?<![0-9A-Za-z_-])"
ISSUED = {
    "AWS access key": r"(?:AKIA|ASIA|ABIA|ACCA)[A-Z0-9]{16}(?![0-9A-Za-z])",
    "GitHub token": r"gh[pousr]_[A-Za-z0-9]{36,255}|github_pat_[A-Za-z0-9_]{22,255}",
    "GitLab token": r"glpat-[A-Za-z0-9_-]{20,64}",
    "Slack token": r"xox[abeposr]-[A-Za-z0-9-]{10,250}",
    "Stripe key": r"(?:sk|rk|pk|whsec)_(?:live|test)_[A-Za-z0-9]{16,250}",
    "Google API key": r"AIza[A-Za-z0-9_-]{35}(?![A-Za-z0-9_-])",
    "Google OAuth": r"ya29\.[A-Za-z0-9_-]{20,1000}|GOCSPX-[A-Za-z0-9_-]{20,64}",
    "OpenAI-like key": r"sk-(?=[A-Za-z0-9_-]{0,200}\d)[A-Za-z0-9_-]{20,250}",
    "Hugging Face token": r"hf_[A-Za-z0-9]{30,64}",
    "npm token": r"npm_[A-Za-z0-9]{36}",
    "PyPI token": r"pypi-[A-Za-z0-9_-]{50,400}",
    "SendGrid key": r"SG\.[A-Za-z0-9_-]{16,32}\.[A-Za-z0-9_-]{32,64}",
    "DigitalOcean token": r"do[opr]_v1_[a-f0-9]{64}",
    "kernelm key": r"km_[A-Za-z0-9_-]{20,200}",
    "JSON Web Token": r"eyJ[A-Za-z0-9_-]{8,1500}\.eyJ[A-Za-z0-9_-]{8,4000}\.[A-Za-z0-9_-]{8,1500}",
}  # fmt: skip
PREFIXES = (r"AKIA|ASIA|ABIA|ACCA|gh[pousr]_|github_pat_|glpat-|xox[abeposr]-|(?:sk|rk|pk|whsec)_(?:live|test)_|AIza|ya29\.|GOCSPX-"
            r"|sk-|hf_|npm_|pypi-|SG\.|do[opr]_v1_|km_|eyJ|-----BEGIN|://[^\s/@]{1,64}:[^\s/@]{3,64}@")  # fmt: skip
PREFIX_HINT = re2.compile(PREFIXES)
TOKEN = re.compile(BEFORE + "(?:" + "|".join(f"({pattern})" for pattern in ISSUED.values()) + ")")
NAMES = tuple(ISSUED)

# RFC 7468; the body may be cut off or have its line breaks escaped, as in JSON. What follows the header is optional, so that
# a match never has to go back over a long body
_BREAK = r"(?:\s|\\[nr]){0,4}"
_END = rf"{_BREAK}-----END [A-Z0-9 ]{{0,40}}PRIVATE KEY(?: BLOCK)?-----"
PEM = re.compile(r"-----BEGIN [A-Z0-9 ]{0,40}PRIVATE KEY(?: BLOCK)?-----"
                 rf"(?:{_BREAK}(?:[A-Z][A-Za-z-]{{2,20}}: [^\n\\]{{1,80}}|[A-Za-z0-9+/=]{{16,512}})){{0,140}}"
                 rf"(?:{_BREAK}[A-Za-z0-9+/=]{{1,76}}(?={_END}))?(?:{_END})?")  # fmt: skip
PEM_LONGEST = 8000  # characters; RSA with 4,096 bits has 3,272
PEM_START = "-----BEGIN "

CREDENTIALS = re.compile(r"://[A-Za-z0-9._%+-]{1,64}:(?!//)(?P<value>[!-.0-9;-?A-~]{3,64})(?=@[A-Za-z0-9])")

SECRET_NAME = (r"(?:passw(?:or)?d|passwd|passphrase|pwd|secret|token|credentials?|密码|口令|密钥"
               r"|(?:api|access|auth|private|encryption|account)[_-]?key)(?:[_-][A-Za-z0-9_-]{1,20})?")  # fmt: skip
QUOTED = r"(?<=[\"'`])(?P<quoted>(?:(?![\"'`])[!-~]){8,200})(?=[\"'`])"
BARE = r"(?P<value>(?:(?![\"'`,;<>{}\[\]])[!-~]){8,200})(?![A-Za-z0-9])"
ASSIGNMENT = re.compile(rf"(?i){SECRET_NAME}(?:[\"'`]?\s{{0,2}}(?:[:=\uff1a]|:=|=>|是|为)\s{{0,2}}[\"'`]?)(?:{QUOTED}|{BARE})")
HINT = rf"(?i){SECRET_NAME}[\"'`]?\s{{0,2}}(?:[:=\x{{ff1a}}]|是|为)"
ASSIGNMENT_HINT = re2.compile(HINT)
# what stands for a secret: [SECRET], <token>, ${NAME}, $NAME, %NAME%, call(...), xxxx, a path, a word that says so
PLACEHOLDER = re.compile(
    r"(?i)^(?:\[[A-Z]|<[^>]*>$|\$[{(]|\$\w+$|%\w+%|[A-Za-z_]{3,}\w*\(|[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)+\(|x{4,}|\.|/|-|(?:os|process|self|config|settings)\.|https?:|file:"
    r"|(?:your|my|the|none|null|true|false|example|changeme|env|optional|user)|(?:test|str|string|pw|secret|pass(?:word|wd|phrase)?)$)"
    r"|\*{3}|\.\.\.|://"
)


def entropy(text: str) -> float:
    """Shannon entropy of the characters' frequencies, bits a character."""
    return -sum(n / len(text) * math.log2(n / len(text)) for n in Counter(text).values())


VARIABLE = re.compile(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)+|[a-z]+(?:_[a-z0-9]+)+|(?:[A-Z]+[a-z]*\d?[A-Z]*){1,4}[a-z]*")


def is_secret(value: str) -> bool:
    """Does a value look drawn by chance? Letters together with digits or signs, few repeated, and no name of a variable."""
    if PLACEHOLDER.search(value) or VARIABLE.fullmatch(value.rstrip(")")) or not re.search(r"[A-Za-z]", value):
        return False
    kinds = sum(re.search(kind, value) is not None for kind in (r"[a-z]", r"[A-Z]", r"\d", r"[^A-Za-z0-9_.]"))
    if not re.search(r"\d", value) and not (kinds >= 3 and re.search(r"[^A-Za-z0-9_.\-/]", value)):
        return False
    return kinds >= 2 and entropy(value) >= (2.75 if len(value) < 20 else 3.2)


def find_issued(text: str) -> Iterator[Span]:
    for hint in PREFIX_HINT.finditer(text):
        at = hint.start()
        if match := TOKEN.match(text, at):
            if match.lastindex is not None and entropy(match[0]) > 2.5:  # `sk-xxxxxxxxxxxxxxxxxxxx` is a placeholder
                yield Span(*match.span(), "secret", 0.99, NAMES[match.lastindex - 1])
        elif match := PEM.match(text, at):
            yield Span(at, min(match.end(), at + PEM_LONGEST), "secret", 1.0, "private key")
        elif (match := CREDENTIALS.match(text, at)) and not PLACEHOLDER.search(match["value"]):
            yield Span(*match.span("value"), "secret", 0.9, "password in a URL")


def find_assigned(text: str) -> Iterator[Span]:
    for hint in ASSIGNMENT_HINT.finditer(text):
        start = hint.start()
        if text[max(start - 1, 0) : start] == "[":  # `[SECRET:9f86d081884c7d65]`, a placeholder
            continue
        match = ASSIGNMENT.match(text, start)
        group = "quoted" if match and match["quoted"] else "value"
        if match and is_secret(match[group]):
            yield Span(*match.span(group), "secret", 0.8, "assigned to a secret's name")
