"""`data/1`: raw text becomes clean, deduplicated, split, tokenized, versioned datasets.

A dataset is an artifact of kind "dataset": `dataset.json` (a `DatasetCard`), `<split>.parquet` (columns: `id` string,
`text` string, `label` int32, `input_ids` list<int32>), `labels.json`, `tokenizer.json` (if tokenized), `card.md`, `*.png`.
"""

from typing import Any, ClassVar

from msgspec import Struct

from kernelm_sdk.contract import Contract, job, unary
from kernelm_sdk.events import Event
from kernelm_sdk.plugin import Job
from kernelm_sdk.system import ArtifactName


class Clean(Struct, frozen=True, forbid_unknown_fields=True):
    """What is done to every text, in this order."""

    fix_mojibake: bool = True  # ftfy
    normalize: str = "NFC"  # Unicode form; "" to leave
    drop_control: bool = True
    collapse_whitespace: bool = True
    min_characters: int = 20  # shorter documents are dropped and counted


class Deduplicate(Struct, frozen=True, forbid_unknown_fields=True):
    exact: bool = True
    near: bool = True
    jaccard: float = 0.8  # of sets of word 5-grams (or fewer); at or above it two documents are near duplicates
    permutations: int = 128  # of MinHash


class Split(Struct, frozen=True, forbid_unknown_fields=True):
    validation: float = 0.1  # share of the documents, stratified by label
    test: float = 0.2
    seed: int = 0


class Tokenize(Struct, frozen=True, forbid_unknown_fields=True):
    tokenizer: str = ""  # digest of an artifact with tokenizer.json; "" for no token ids
    max_tokens: int = 256  # longer documents are cut, and counted


class PrepareRequest(Struct, frozen=True, forbid_unknown_fields=True):
    source: str  # digest of an artifact: a folder of text files, one sub-folder a class
    format: str = "folders"  # "folders": <class>/<document>.txt
    name: str = "dataset"
    expect_labels: tuple[str, ...] = ()  # if given, exactly these classes must be there
    max_broken: float = 0.05  # share of documents that may be unreadable before the job fails; each is quarantined
    clean: Clean = Clean()
    deduplicate: Deduplicate = Deduplicate()
    split: Split = Split()
    tokenize: Tokenize = Tokenize()


class Step(Struct, frozen=True):
    """One step of the account: what went in, what came out, and why the rest did not."""

    name: str
    documents_in: int
    documents_out: int
    reasons: dict[str, int] = {}  # reason -> documents dropped
    examples: tuple[str, ...] = ()  # ids of a few dropped documents, never their text
    changed: dict[str, int] = {}  # what was done to documents that stayed, e.g. "decoded from cp1252" -> documents


class SplitCard(Struct, frozen=True):
    documents: int
    tokens: int
    per_label: dict[str, int] = {}


class DatasetCard(Struct, frozen=True):
    name: str
    labels: tuple[str, ...]
    steps: tuple[Step, ...]
    splits: dict[str, SplitCard]
    max_tokens: int
    tokenizer: str = ""
    characters: dict[str, float] = {}  # quantiles of length: "p50": ...
    source: str = ""


class Prepared(Struct, frozen=True):
    dataset: str  # digest
    documents: int
    labels: tuple[str, ...]
    splits: dict[str, int]
    card: DatasetCard


class DatasetPrepared(Event, frozen=True):
    """A dataset version is in the store."""

    TYPE: ClassVar[str] = "dataset.prepared"
    name: str
    dataset: str
    documents: int


class Data(Contract, name="data", major=1):
    """Turns raw text into datasets, with an account of every document."""

    events = (DatasetPrepared,)

    @job
    async def prepare(self, request: PrepareRequest, job: Job) -> Prepared:
        """Read, clean, deduplicate, split without leakage, tokenize, store."""
        ...

    @unary
    async def describe(self, request: ArtifactName, call: Any) -> DatasetCard:
        """The card of a stored dataset."""
        ...
