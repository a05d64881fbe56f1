"""The books of a shard: for each step what came in, went out, was changed and dropped; they add up over shards."""

from collections import Counter

import msgspec

from kernelm_contracts.data import Step
from kernelm_data.account import Dropped
from kernelm_sdk.errors import PluginFault

EXAMPLES = 5  # documents that a step shows for each reason
EXCERPT = 240  # characters of an example


class Example(msgspec.Struct, frozen=True):
    """A document that a step dropped or changed, for the report page; private values are replaced."""

    id: str
    before: str
    after: str = ""


class StepBook(msgspec.Struct):
    """One step."""

    name: str
    documents_in: int = 0
    documents_out: int = 0
    reasons: dict[str, int] = {}
    changed: dict[str, int] = {}
    examples: dict[str, list[Example]] = {}  # reason or change -> a few

    def add(self, other: "StepBook") -> None:
        self.documents_in += other.documents_in
        self.documents_out += other.documents_out
        for mine, theirs in ((self.reasons, other.reasons), (self.changed, other.changed)):
            for key, count in theirs.items():
                mine[key] = mine.get(key, 0) + count
        for key, examples in other.examples.items():
            self.examples[key] = (self.examples.get(key, []) + examples)[:EXAMPLES]

    def drop(self, reason: str, count: int = 1) -> None:
        self.reasons[reason] = self.reasons.get(reason, 0) + count

    def change(self, what: str) -> None:
        self.changed[what] = self.changed.get(what, 0) + 1

    def wants(self, what: str) -> bool:
        """Whether an example of this would be kept."""
        return len(self.examples.get(what, ())) < EXAMPLES

    def show(self, what: str, example: Example) -> None:
        self.examples.setdefault(what, []).append(example)

    def card(self) -> Step:
        """The step's line in the card; PluginFault if a document is neither passed on nor accounted for."""
        if self.documents_in != self.documents_out + sum(self.reasons.values()):
            raise PluginFault(
                "unaccounted",
                f"step {self.name!r}: {self.documents_in} documents in, {self.documents_out} out and "
                f"{sum(self.reasons.values())} dropped do not add up",
                "report this; nothing was stored",
            )
        ids = tuple(e.id for examples in self.examples.values() for e in examples if not e.after)[:EXAMPLES]
        return Step(self.name, self.documents_in, self.documents_out, dict(sorted(self.reasons.items())), ids,
                    dict(sorted(self.changed.items())))  # fmt: skip


class ShardBook(msgspec.Struct):
    """All that is known of a shard when its documents have been through the first steps; written last, so that a shard that has
    one is complete."""

    steps: list[StepBook]
    bytes_in: int = 0
    text_bytes: int = 0  # of the documents that are left
    seconds: float = 0.0
    broken: int = 0
    broken_examples: list[str] = []
    sources: dict[str, int] = {}
    languages: dict[str, int] = {}
    private_documents: int = 0
    private_affected: int = 0
    private_found: dict[str, int] = {}
    private_reported: dict[str, dict[str, int]] = {}  # id -> found, of documents that stay as they are
    lengths: list[int] = []  # characters of a sample of the documents

    def add(self, other: "ShardBook") -> None:
        for mine, theirs in zip(self.steps, other.steps, strict=True):
            mine.add(theirs)
        for name in ("bytes_in", "text_bytes", "seconds", "broken", "private_documents", "private_affected"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name in ("sources", "languages", "private_found"):
            total = Counter(getattr(self, name))
            total.update(getattr(other, name))
            setattr(self, name, dict(sorted(total.items())))
        self.broken_examples = (self.broken_examples + other.broken_examples)[:EXAMPLES]
        self.lengths += other.lengths


class Lost:
    """The lines of `dropped.jsonl` of a shard."""

    def __init__(self) -> None:
        self._encoder = msgspec.json.Encoder()
        self.data = bytearray()

    def add(self, id: str, step: str, reason: str, detail: str = "", kept: str = "", jaccard: float = 0.0) -> None:
        self.data += self._encoder.encode(Dropped(id, step, reason, detail, kept, round(jaccard, 4))) + b"\n"
