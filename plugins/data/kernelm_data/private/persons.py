"""What a text itself says about the names in it: titles and roles before them, and who was named in full elsewhere."""

import re
from collections.abc import Iterable, Iterator

Bounds = tuple[int, int]  # characters of a unit
LEAST = 3  # characters of a part of a name that is remembered
MOST = 512  # parts that are remembered of a stream, whose state carries them


def _set(words: str) -> frozenset[str]:
    return frozenset(words.split())


TITLES = _set("Mr Mrs Ms Miss Mx Dr Sir Dame Lord Lady Baroness Prof Rev Reverend Sgt Capt Col")
# what a person is, right before the name
ROLES = _set("""
    actor actress analyst archbishop architect artist attorney author barrister bishop boss captain cardinal chairman chairwoman
    chancellor coach colonel comedian commissioner composer conductor congressman congresswoman councillor critic dancer daughter
    defender designer director economist editor filmmaker flanker fly-half footballer founder goalkeeper governor guitarist
    historian hooker husband inventor journalist judge lawyer leader lock manager mayor mep midfielder minister mp musician
    newcomer novelist photographer physicist pianist playwright poet politician pope premier presenter president prince princess
    producer professor rapper rival scientist scrum-half secretary senator singer skipper solicitor songwriter spokesman
    spokeswoman star striker superstar supermodel teammate veteran winger writer
""")
# what goes on an office behind a role: Lord Chancellor, Secretary General
OFFICES = _set("""
    Assembly Chancellor Chief Council Deputy Director Executive Foreign General Home Justice Leader Mayor Minister Office Premier
    President Prime Secretary Shadow Treasury Vice
""")
# what makes an organization, a place, an event or a work of a name, behind it or as its last word
NO_PERSON = _set("""
    Academy Act Agency Airlines Airport Airways Albion Alliance Archive Arena Army Assembly Association Athletic Authority Avenue
    Award Awards Band Bank Bay Beach Boys Brands Bridge Brigade Building Capital Castle Cathedral Center Centre Championship
    Championships Chronicle Chronicles Church City Classic Club Coalition College Commission Committee Communications Company
    Conference Congress Corp Corporation Council County Court Crew Cup Day Democrats Department Electronics Energy Entertainment
    Exchange FC Federation Festival Films Force Forum Foundation Games Gardens Gazette Girls Group Hall Herald Holdings Hospital
    Hotel House Inc Institute Insurance International Island Islands Lake League Library Limited Live Ltd Magazine Marathon Masters
    Media Mobile Motors Movement Museum Music Networks News Ocean Olympics Online Open Orchestra Oscar Oscars Palace Park
    Parliament Partners Party Pictures Plc Police Port Portable Press Prize Productions Project Radio Records Research Review River
    Road Rovers School Sea Securities Senate Series Show Slam Society Software Square Stadium Station Street Studios Summit Systems
    Technologies Telecom Telegraph Television Theatre Times Tonight Tournament Tower Town Treasury Tribune Trophy Trust Tunnel
    Union United University Valley Wanderers Way Weekly
""")
# the same as its first word
NO_FIRST = _set("""
    Cape Channel Club Fort Global International Lake Mount National New North Operation Port Project Radio San Santa South Team
    University World
""")
# what is no person, right before its name
KINDS = _set("""
    airline album band bank bookmaker bookmakers brand broadcaster carrier chain club company distributor firm giant group label
    magazine manufacturer musical newspaper quartet retailer rockers sitcom studio supermarket trio website
""")
# names that are words, too: at the beginning of a sentence they are taken for words
COMMON = _set("""
    April August Best Black Brown Bush Christian Close Cook Day Early Fish Good Grant Gray Green Hope House Hunt Just King Law
    Little Long Major March Mark May Moore Page Park Pat Price Prince Rich Rose Short Summer Sunday Sweet Van White Will Wise Wood
    Young
""")
WORD = "[A-Z\u00c0-\u00de\u0100-\u017f][\\w'\u2019-]*"
PARTICLE = "(?:de|da|di|del|der|den|van|von|la|le|al|bin|ibn|dos|el)"
NAMED = rf"({WORD}(?:[ \u00a0](?:{PARTICLE}[ \u00a0]){{0,2}}{WORD}){{0,2}})"
TITLE = re.compile(rf"\b(?:{'|'.join(sorted(TITLES))})\.?[ \u00a0]+{NAMED}")
ROLE = re.compile(rf"\b(?i:{'|'.join(sorted(ROLES))})[ \u00a0]{NAMED}")
FOLLOWING = re.compile(rf"(?:['\u2019]s)?[ \u00a0]({WORD})")
BEFORE = re.compile(rf"\b(?:{'|'.join(sorted(KINDS))}|(?:city|district|island|province|suburb|town|village) of)[ \u00a0]\Z")
# bands, clubs and firms have done what one person has; "A and B have" is another matter, so the name has to begin its clause
MANY = re.compile(r"(?:,[ \u00a0]who)?[ \u00a0](?:are|were|have)\b")
CLAUSE = re.compile(r"(?:\A|\b(?:although|as|because|but|if|since|that|when|whereas|while)[ \u00a0])[ \t\"'\u201c\u2018]*\Z")
ARTICLE = re.compile(r"(?i)\bthe\s\Z")
ALONE = re.compile(rf"(?<![\w@/&.-]){WORD}(?![\w@/'\u2019-])")
POSSESSIVE = re.compile("(?:['\u2019]s?|-)\\Z")
OPENING = " \t\n\"'\u201c\u2018(-"  # what may stand before the first word of a sentence


class Persons:
    """Who was named in a text so far: the parts of names that were given in full, or behind a title or role.

    A single word that the model takes for a person is one only if it is such a part: else it is a club, a band or a product more
    often than not.
    """

    def __init__(self, parts: Iterable[str] = (), most: int = MOST) -> None:
        self._parts, self._most = dict.fromkeys(parts), most

    @property
    def parts(self) -> tuple[str, ...]:
        """For another `Persons` to go on from; those last met are last."""
        return tuple(self._parts)

    def meet(self, unit: str, found: Iterable[Bounds]) -> list[Bounds]:
        """Where persons are named in full in a unit: of `found`, what the model takes for persons, and behind titles and roles.
        From now on they are known."""
        spans = [(a, b) for a, b in found if " " in unit[a:b] and not _elsewhere(unit, a, b)]
        spans += _introduced(unit)
        for start, end in spans:
            self._learn(unit[start:end].split())
        return spans

    def _learn(self, words: list[str]) -> None:
        for word in words:
            word = word.strip("'\u2019.,-")
            if len(word) >= LEAST and word[0].isupper() and word not in TITLES:
                self._parts.pop(word, None)
                self._parts[word] = None
        while len(self._parts) > self._most:
            del self._parts[next(iter(self._parts))]

    def again(self, unit: str) -> list[Bounds]:
        """Where parts of known names stand, those side by side together."""
        spans: list[Bounds] = []
        for match in ALONE.finditer(unit):
            start, word = match.start(), POSSESSIVE.sub("", match[0])
            if word not in self._parts or (word in COMMON and not unit[:start].strip(OPENING)):
                continue
            if spans and unit[spans[-1][1] : start] == " ":
                start = spans.pop()[0]
            spans.append((start, match.start() + len(word)))
        return [(start, end) for start, end in spans if not _elsewhere(unit, start, end)]


def _introduced(unit: str) -> Iterator[Bounds]:
    """Names behind a title or a role."""
    for match in (*TITLE.finditer(unit), *ROLE.finditer(unit)):
        start, end = match.span(1)
        if OFFICES.isdisjoint(match[1].split()) and not _elsewhere(unit, start, end):
            yield start, start + len(POSSESSIVE.sub("", match[1]))


def _elsewhere(unit: str, start: int, end: int) -> bool:
    """Whether what stands around a name makes it the name of something else."""
    words = unit[start:end].split()
    following = FOLLOWING.match(unit, end)
    if words[-1] in NO_PERSON or (following and following[1] in NO_PERSON):
        return True
    if len(words) == 1:
        return ARTICLE.search(unit[max(start - 8, 0) : start]) is not None or BEFORE.search(unit[:start]) is not None
    return words[0] in NO_FIRST or words[0].lower() == "the" or said_of_none(unit, start, end)


def said_of_none(unit: str, start: int, end: int) -> bool:
    """Whether the text says of a name that it is that of a band, a firm or a place, or of many, as its verb tells."""
    if BEFORE.search(unit[:start]):
        return True
    return MANY.match(unit, end) is not None and CLAUSE.search(unit[:start]) is not None
