"""Documents to passages. Pure but for reading the files of a dataset."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec

from kernelm_contracts.data import DatasetCard
from kernelm_contracts.splits import batches
from kernelm_sdk.errors import ClientFault

SENTENCE = re.compile(r"(?<=[.!?])[\"')\]\u201d\u2019]?\s+(?=[\"'(\[\u201c\u2018]?[A-Z0-9])|(?<=[\u3002\uff01\uff1f])")
TITLE = 120  # characters, at most


class Passage(NamedTuple):
    """A part of a document."""

    document: str  # id
    title: str
    passage: str
    label: str

    @property
    def text(self) -> str:
        """What is embedded: a passage by itself often does not say what it is about."""
        return f"{self.title}\n{self.passage}"


def read(folder: Path, words: int) -> list[Passage]:
    """The passages of all documents of a dataset, those of a document together, documents by id; ClientFault "invalid_dataset"
    if it holds none."""
    try:
        card = msgspec.json.decode((folder / "dataset.json").read_bytes(), type=DatasetCard)
        rows = sorted(row for split in card.splits for row in _rows(folder, split, card.labels))
    except (OSError, msgspec.DecodeError, IndexError) as error:
        raise _invalid(f"{type(error).__name__}: {error}") from None
    found = [part for row in rows for part in cut(*row, words)]
    if not found:
        raise _invalid("no document has any text")
    return found


def _rows(folder: Path, split: str, labels: Sequence[str]) -> Iterator[tuple[str, str, str]]:
    """(id, text, label) of the split's documents. A label is a position among the dataset's, or in a corpus a text."""
    for batch in batches(folder, split, ("id", "text", "label")):
        for id, text, label in zip(*(column.to_pylist() for column in batch.columns), strict=True):
            yield id, text, labels[label] if isinstance(label, int) else label or ""


def cut(document: str, text: str, label: str, words: int) -> Iterator[Passage]:
    """The passages of one document: whole paragraphs as far as they fit, else sentences, else words."""
    first, _, rest = text.strip().partition("\n")
    title = first if len(first) <= TITLE else first[:TITLE].rsplit(" ", 1)[0] + " …"
    body = rest if rest.strip() else first
    for passage in _packed([line for line in body.split("\n") if line.strip()], words):
        yield Passage(document, title, passage, label)


def _packed(units: Sequence[str], words: int) -> Iterator[str]:
    """`units` one behind the other, as many as have `words` words together; one that has more is cut."""
    held: list[str] = []
    count = 0
    for unit in (part for whole in units for part in _parts(whole.strip(), words)):
        size = len(unit.split())
        if held and count + size > words:
            yield " ".join(held)
            held, count = [], 0
        held.append(unit)
        count += size
    if held:
        yield " ".join(held)


def _parts(paragraph: str, words: int) -> Iterator[str]:
    if len(paragraph.split()) <= words:
        yield paragraph
        return
    for sentence in SENTENCE.split(paragraph):
        split = sentence.split()
        yield from (" ".join(split[k : k + words]) for k in range(0, len(split), words))


def _invalid(what: str) -> ClientFault:
    return ClientFault("invalid_dataset", f"dataset: {what}", "give the digest of what data/1.prepare made, with documents in it")
