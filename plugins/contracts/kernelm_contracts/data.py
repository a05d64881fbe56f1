"""`data/1`: raw text becomes clean, deduplicated, split, tokenized, versioned datasets.

A dataset is an artifact of kind "dataset": `dataset.json` (a `DatasetCard`), `<split>.parquet` (columns: `id` string,
`text` string, `label` int32, `input_ids` list<int32>), `labels.json`, `tokenizer.json` (if tokenized), `card.md`, `*.png`.

A corpus is a dataset too, made where `PrepareRequest.format` is not "folders": its rows lie in `<split>/<number>.parquet`
(`id`, `text`, `source`, `label` string, `input_ids`), packed sequences in `packed/<split>/<number>.parquet` (`input_ids`, and
`starts`: where documents begin), and `manifest.json` (a `Manifest`) names every file with its digest.
"""

from typing import Any, ClassVar, Literal

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
    test: float = 0.2  # the same; the rest is for training
    seed: int = 0


class Tokenize(Struct, frozen=True, forbid_unknown_fields=True):
    tokenizer: str = ""  # digest of an artifact with tokenizer.json; "" for no token ids
    max_tokens: int = 256  # longer documents are cut, and counted


PrivateType = Literal["email", "phone", "card", "iban", "national_id", "ip", "secret", "name"]
RULED: tuple[PrivateType, ...] = ("email", "phone", "card", "iban", "national_id", "ip", "secret")  # what rules and checksums find


class Private(Struct, frozen=True, forbid_unknown_fields=True):
    """What is done about private data. Values never leave the texts: accounts and cards hold types and counts."""

    # a placeholder for each value; no document that holds one; count only
    action: Literal["redact", "quarantine", "report"] = "redact"
    types: tuple[PrivateType, ...] = RULED
    names: bool = False  # of persons, too, by a model: some thousand times slower than the rest
    # [EMAIL]; [EMAIL_1], the same number for the same value of a text; [EMAIL:<hash>], the same hash for the same value anywhere,
    # under a secret key that the plugin's setting `private_key_file` names
    style: Literal["type", "number", "hash"] = "type"


class Input(Struct, frozen=True, forbid_unknown_fields=True):
    """Where raw documents lie and how they are read."""

    artifact: str = ""  # digest; "" where `url` says it
    url: str = ""  # a local path or what fsspec reaches (s3://, https://), which the plugin's settings must grant
    # "auto": by the name; html, pdf, text, csv, jsonl, parquet, warc, zip, tar, each of them packed or not (gz, zst, bz2, xz)
    format: str = "auto"
    include: tuple[str, ...] = ()  # patterns of paths inside, as of fnmatch; none: every file
    text: str = "text"  # column or key of the text: csv, jsonl, parquet
    id: str = ""  # column of the id; "": path and number of the record
    label: str = ""  # column of the label; "": none
    delimiter: str = ","  # csv


class CleanStep(Struct, frozen=True, forbid_unknown_fields=True):
    """One step of cleaning; steps are done in the order of the list."""

    # "mojibake", "normalize" (form), "control", "whitespace", "boilerplate" (max_words), "html-entities"
    do: str
    settings: dict[str, float | str] = {}


class Filter(Struct, frozen=True, forbid_unknown_fields=True):
    """One rule that drops documents; the thresholds of its source hold where `settings` names none."""

    # "language" (keep: "en,zh", confidence), "gopher-quality", "gopher-repetition", "c4", "fineweb"; one's own functions are hooks
    use: str
    settings: dict[str, float | str] = {}


class Pack(Struct, frozen=True, forbid_unknown_fields=True):
    length: int = 0  # tokens of a packed sequence; 0 for none
    separator: str = ""  # the token between two documents; "": the tokenizer's end of text


class Train(Struct, frozen=True, forbid_unknown_fields=True):
    """A new tokenizer, trained on this corpus."""

    kind: str = ""  # "bpe" (byte-level), "bpe-characters", "wordpiece"; "" for none
    vocabulary: int = 32000  # tokens
    sample_mb: float = 64.0  # MB of text it is trained on


class Store(Struct, frozen=True, forbid_unknown_fields=True):
    shard_mb: float = 32.0  # MB of input that one worker takes at a time
    zstd_level: int = 3
    append_to: str = ""  # digest of the dataset whose next version this is: its shards stay as they are


class Limits(Struct, frozen=True, forbid_unknown_fields=True):
    """What no record may exceed; what does is quarantined."""

    document_mb: float = 16.0  # of one document, unpacked
    expansion: float = 200.0  # bytes that one packed byte may become, from 16 MB on


class PrepareRequest(Struct, frozen=True, forbid_unknown_fields=True):
    source: str  # digest of an artifact: a folder of text files, one sub-folder a class; of a corpus any folder
    format: str = "folders"  # "folders": <class>/<document>.txt, a dataset that fits into memory; else a corpus: see `Input.format`
    name: str = "dataset"
    expect_labels: tuple[str, ...] = ()  # if given, exactly these classes must be there
    max_broken: float = 0.05  # share of documents that may be unreadable before the job fails; each is quarantined
    clean: Clean = Clean()
    deduplicate: Deduplicate = Deduplicate()
    split: Split = Split()
    tokenize: Tokenize = Tokenize()
    private: Private | None = None  # None: nothing is looked for, and the card says so
    # of a corpus: `format` is one of `Input.format`, and `source` may be "" if `inputs` are given
    inputs: tuple[Input, ...] = ()  # beside `source`
    steps: tuple[CleanStep, ...] = ()  # in place of `clean`, in this order
    filters: tuple[Filter, ...] = ()
    against: tuple[str, ...] = ()  # digests of datasets whose documents are not taken again
    test_sets: tuple[str, ...] = ()  # digests of datasets; what shares `contamination_words` in a row with them is dropped
    contamination_words: int = 13  # as in Brown et al., "Language models are few-shot learners", 2020, appendix C
    train: Train = Train()
    pack: Pack = Pack()
    store: Store = Store()
    limits: Limits = Limits()
    engine: str = "local"  # "local": processes of this machine; "ray": a Ray cluster, see the settings of the data plugin


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


class PrivateCard(Struct, frozen=True):
    """What was looked for in a dataset's texts, what was found, and what is left in them."""

    action: str  # of `Private`
    types: tuple[str, ...]  # that were looked for
    documents: int  # that were searched
    affected: int  # documents with private data among them
    found: dict[str, int] = {}  # type -> values
    left: dict[str, int] = {}  # type -> values that the dataset still holds, as far as they were found


class DatasetCard(Struct, frozen=True):
    name: str
    labels: tuple[str, ...]
    steps: tuple[Step, ...]
    splits: dict[str, SplitCard]
    max_tokens: int
    tokenizer: str = ""
    characters: dict[str, float] = {}  # quantiles of length: "p50": ...
    source: str = ""
    private: PrivateCard | None = None  # None: nobody looked
    version: int = 1  # grows by one at each append
    parent: str = ""  # digest of the version before
    bytes_in: int = 0  # of a corpus: bytes of its files
    sources: dict[str, int] = {}  # of a corpus: format -> documents read
    languages: dict[str, int] = {}  # of a corpus: code -> documents, where a language filter ran


class ShardFile(Struct, frozen=True):
    path: str
    digest: str  # SHA-256 of the file
    rows: int
    bytes: int
    version: int = 1  # the version that brought it


class Manifest(Struct, frozen=True):
    """The files of a corpus and where they come from."""

    name: str
    version: int
    parent: str
    shards: tuple[ShardFile, ...]
    request: PrepareRequest
    libraries: dict[str, str] = {}  # name -> version of what shaped the content


class Prepared(Struct, frozen=True):
    dataset: str  # digest
    documents: int
    labels: tuple[str, ...]
    splits: dict[str, int]
    card: DatasetCard


class RedactRequest(Struct, frozen=True, forbid_unknown_fields=True):
    texts: tuple[str, ...]
    private: Private = Private()  # its action is "redact" here; numbers run through all texts of a request


class Redacted(Struct, frozen=True):
    texts: tuple[str, ...]  # as many, in the same order
    found: tuple[dict[str, int], ...]  # of each text: type -> values


class RedactState(Struct, frozen=True, forbid_unknown_fields=True):
    """Where the redaction of a stream stands. Give it back as it came; it holds private text, so keep it from logs."""

    text: str = ""  # the end of what was given out, then what is held back
    given: int = 0  # characters of `text` that were given out
    persons: tuple[str, ...] = ()  # parts of names given in full so far, at most 512: alone they are names from then on, not before


class RedactPart(Struct, frozen=True, forbid_unknown_fields=True):
    """The next piece of a text that is still being written, such as an answer of a model."""

    text: str
    state: RedactState = RedactState()  # of the piece before; the default begins a text
    last: bool = False  # the text ends here: nothing is held back any more
    private: Private = Private()  # the same for all pieces; its style is "type" or "hash"


class RedactedPart(Struct, frozen=True):
    text: str  # what is safe to give out; the pieces, put together, are what `redact` makes of the whole
    state: RedactState
    found: dict[str, int] = {}  # in `text`: type -> values


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

    @unary
    async def redact(self, request: RedactRequest, call: Any) -> Redacted:
        """The texts with placeholders for private values: what `prepare` does to a dataset, for prompts and answers."""
        ...

    @unary
    async def redact_part(self, request: RedactPart, call: Any) -> RedactedPart:
        """The same for a text that comes in pieces. All that lasts between two of them is in the state: any instance may answer."""
        ...
