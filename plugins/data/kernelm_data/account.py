"""The account of every document: what each step took in, gave out, changed and dropped, and how fast it goes."""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import msgspec

from kernelm_contracts.data import Step
from kernelm_sdk.errors import PluginFault

T = TypeVar("T")
Report = Callable[[float, str, str, float], None]  # fraction of the job, phase, message, documents/s

EXAMPLES = 5  # ids of dropped documents that a step names
EVERY = 64  # documents between two reports of progress


class Document(msgspec.Struct):
    """One text on its way through the steps."""

    id: str  # "<class>/<document>.txt", as the reader gives it
    label: str
    text: str


class Dropped(msgspec.Struct, frozen=True, omit_defaults=True):
    """A line of `dropped.jsonl`: why a document is not in the dataset. Its text stays in the source only."""

    id: str
    step: str
    reason: str
    detail: str = ""  # the error, for a person
    kept: str = ""  # of a duplicate: the document that stands for it
    jaccard: float = 0.0  # of a near duplicate: the similarity to `kept`


class Tally:
    """The books of one step."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.dropped: list[Dropped] = []
        self.changed: Counter[str] = Counter()

    def drop(self, id: str, reason: str, *, detail: str = "", kept: str = "", jaccard: float = 0.0) -> None:
        """Note that the document `id` goes no further."""
        self.dropped.append(Dropped(id, self.name, reason, detail, kept, round(jaccard, 4)))

    def step(self, documents_in: int, documents_out: int) -> Step:
        """The step's line in the card; PluginFault if a document is neither passed on nor accounted for."""
        if documents_in != documents_out + len(self.dropped):
            raise PluginFault("unaccounted", f"step {self.name!r}: {documents_in} documents in, {documents_out} out and "
                                             f"{len(self.dropped)} dropped do not add up", "report this; nothing was stored")
        reasons = dict(sorted(Counter(d.reason for d in self.dropped).items()))
        examples = tuple(d.id for d in self.dropped[:EXAMPLES])
        return Step(self.name, documents_in, documents_out, reasons, examples, dict(sorted(self.changed.items())))


class Meter:
    """Reports how far one phase of the job is, with its documents/s. `span`: the phase's share of the job, from and to."""

    def __init__(self, report: Report, phase: str, span: tuple[float, float], total: int) -> None:
        self._report, self.phase, self.total = report, phase, total
        self._from, self._width = span[0], span[1] - span[0]
        self._start = time.monotonic()

    def at(self, done: int) -> None:
        """`done` of `total` documents are through."""
        rate = done / max(time.monotonic() - self._start, 1e-9)
        share = done / self.total if self.total else 1.0
        message = f"{done} of {self.total} documents"
        self._report(self._from + self._width * share, self.phase, message, round(rate, 1) if done else 0.0)

    def track(self, items: Sequence[T] | Iterator[T]) -> Iterator[T]:
        """The items, reporting on every `EVERY`-th and at the end."""
        self.at(0)
        done = 0
        for done, item in enumerate(items, 1):
            yield item
            if done % EVERY == 0:
                self.at(done)
        self.at(done)
