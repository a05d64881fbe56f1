"""The pipeline's step: what `Private` asks for, done to one text after another, with the books of it."""

from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

from kernelm_contracts.data import Private, PrivateCard
from kernelm_data.private.detect import Detector
from kernelm_data.private.redact import Placeholders, count, redact
from kernelm_data.private.spans import PRIORITY
from kernelm_data.private.stream import Redactor, State
from kernelm_sdk.errors import ClientFault


class Screened(NamedTuple):
    """A text after the step."""

    text: str | None  # None: the document goes to quarantine
    found: dict[str, int]  # type -> values


class Screen:
    """Does what `settings` say. ClientFault for settings that make no sense, or that need what is not installed.

    `key`: for the style "hash".
    """

    def __init__(self, settings: Private, key: bytes = b"") -> None:
        self.settings = settings
        try:
            self._detector = Detector(settings.types, settings.names)
            self._placeholders = Placeholders(settings.style, key)
        except (ValueError, ModuleNotFoundError) as error:
            raise ClientFault("invalid", f"private: {error}", "correct private in the request") from None
        if not self.types:
            raise ClientFault("invalid", "private.types: empty, and names = false: nothing to look for",
                              "leave types out for all, or leave private out")  # fmt: skip
        self._documents, self._affected = 0, 0
        self._found = Counter[str]()
        self.reported = dict[str, dict[str, int]]()  # id -> found, of documents that stay as they are

    @property
    def types(self) -> tuple[str, ...]:
        """What is looked for."""
        return tuple(kind for kind in PRIORITY if kind in self._detector.types or (kind == "name" and self._detector.names))

    def __call__(self, text: str, id: str = "", placeholders: Placeholders | None = None) -> Screened:
        """One text. Numbers of placeholders begin anew in it unless `placeholders` are given."""
        spans = self._detector.detect(text)
        found = count(spans)
        self._documents += 1
        if not found:
            return Screened(text, found)
        self._affected += 1
        self._found.update(found)
        if self.settings.action == "quarantine":
            return Screened(None, found)
        if self.settings.action == "report":
            self.reported[id] = found
            return Screened(text, found)
        if placeholders is None and self.settings.style == "number":
            placeholders = Placeholders("number")
        return Screened(redact(text, spans, placeholders=placeholders or self._placeholders), found)

    def stream(self, state: State) -> Redactor:
        """For a text that comes in pieces."""
        return Redactor(self._detector, self._placeholders, state)

    def card(self, ids: Iterable[str]) -> PrivateCard:
        """The books; `ids`: the documents that are in the dataset in the end."""
        left = Counter[str]()
        for id in ids:
            left.update(self.reported.get(id, {}))
        return PrivateCard(self.settings.action, self.types, self._documents, self._affected,
                           dict(sorted(self._found.items())), dict(sorted(left.items())))  # fmt: skip


def reason(found: dict[str, int]) -> str:
    """Why a document is in quarantine: the gravest type in it."""
    return f"private data: {min(found, key=PRIORITY.__getitem__)}"
