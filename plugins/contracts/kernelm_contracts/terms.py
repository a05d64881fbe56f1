"""The terms of a text, for models of structure "tfidf-linear": one definition for who trains and who serves them. Pure."""

import re
from collections.abc import Callable, Sequence

TOKEN = re.compile(r"(?u)\b\w\w+\b")
SUFFIX = re.compile(r"(?:ing|ed|es|s|ly)$")
NAME = re.compile(r"\b[A-Z][\w']+(?: [A-Z][\w']+)*\b")
LEAD_WORDS = 60  # between white space, from the beginning of the text
STEMMED_FROM = 5  # letters


def tokenize(text: str) -> list[str]:
    """The lower-case tokens."""
    return TOKEN.findall(text.lower())


def words(text: str, ngrams: int = 1, tokens: Sequence[str] | None = None) -> list[str]:
    """The 1..n-grams of the tokens, joined by one space."""
    tokens = tokenize(text) if tokens is None else tokens
    return [" ".join(tokens[i : i + n]) for n in range(1, ngrams + 1) for i in range(len(tokens) - n + 1)]


def stems(text: str, ngrams: int = 1, tokens: Sequence[str] | None = None) -> list[str]:
    """Tokens without a common English ending."""
    return [SUFFIX.sub("", t) if len(t) >= STEMMED_FROM else t for t in (tokenize(text) if tokens is None else tokens)]


def lead(text: str, ngrams: int = 1, tokens: Sequence[str] | None = None) -> list[str]:
    """The tokens that the text begins with."""
    return tokenize(" ".join(text.split()[:LEAD_WORDS]))


def names(text: str, ngrams: int = 1, tokens: Sequence[str] | None = None) -> list[str]:
    """Runs of words with a capital."""
    return NAME.findall(text)


VIEWS: dict[str, Callable[..., list[str]]] = {"words": words, "stems": stems, "lead": lead, "names": names}


def terms(text: str, views: Sequence[str], ngrams: int, tokens: Sequence[str] | None = None) -> list[list[str]]:
    """The terms of each view. Where there are several, a term carries the name of its view: "names:Tony Blair". `tokens` of the
    text, where they are known, are not looked for again."""
    found = [VIEWS[view](text, ngrams, tokens) for view in views]
    return found if len(views) == 1 else [[f"{view}:{term}" for term in of] for view, of in zip(views, found, strict=True)]
