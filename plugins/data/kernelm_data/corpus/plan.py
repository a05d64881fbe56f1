"""What every worker knows: the request, where things lie, and the names of the steps."""

from functools import lru_cache
from pathlib import Path

import msgspec

from kernelm_contracts.data import Input, PrepareRequest
from kernelm_data.corpus.cleaning import as_steps, check_steps
from kernelm_data.corpus.inputs import FORMATS
from kernelm_data.corpus.language import wanted
from kernelm_data.corpus.quality import RULES, rules
from kernelm_data.corpus.sketches import Shape, shape
from kernelm_data.corpus.tokenizing import Facts
from kernelm_data.corpus.training import KINDS
from kernelm_data.hooks import GROUP, Filters
from kernelm_data.split import shares
from kernelm_sdk.errors import ClientFault
from kernelm_sdk.hooks import Hooks

FIRST = "first"  # folder of the shards after the first steps
KEEP = "keep"  # of the masks that deduplication leaves
ENGINES = ("local", "ray")
TESTS = "tests.npy"  # hash table of the n-grams of the test sets


class Plan(msgspec.Struct, frozen=True):
    """Read by every worker from a file, once."""

    request: PrepareRequest
    work: str  # folder of what lies between the steps
    out: str  # folder of the dataset
    inputs: tuple[Input, ...]
    tokens: Facts | None = None  # of the tokenizer, if there is one
    separator: int = 0  # id of the token between packed documents
    key: bytes = b""  # under which private data are hashed
    number: int = 0  # of the first shard: those before it are of earlier versions

    @property
    def form(self) -> Shape:
        return shape(self.request.deduplicate.jaccard, self.request.deduplicate.permutations)


def load(path: str) -> Plan:
    """The plan in a file."""
    return decoded(Path(path).read_bytes())


@lru_cache(4)
def decoded(data: bytes) -> Plan:
    """The plan in a file's bytes."""
    return msgspec.msgpack.decode(data, type=Plan)


@lru_cache(1)
def installed() -> Hooks:
    """The filters of installed distributions, in this process."""
    return Hooks(GROUP, Filters)


def step_names(request: PrepareRequest) -> list[str]:
    """The steps that a document goes through one by one, in order."""
    names = ["read", "clean", *(filter.use for filter in request.filters), *(["private"] if request.private else [])]
    return names + [f"filter {name}" for name in installed().names] + (["contamination"] if request.test_sets else [])


def check_request(request: PrepareRequest) -> None:
    """ClientFault, naming the field, for values that no source could satisfy."""
    store, limits, pack, train = request.store, request.limits, request.pack, request.train
    for field, fits, wanted_ in (
        ("name", request.name.strip() != "", "a name"),
        ("format", request.format in ("auto", *FORMATS), f'"folders", "auto" or one of {", ".join(FORMATS)}'),
        ("source", bool(request.source) != bool(request.inputs) or bool(request.source), "a digest, or inputs"),
        ("max_broken", 0 <= request.max_broken <= 1, "a share from 0 to 1"),
        ("clean.min_characters", request.clean.min_characters >= 0, "0 or more characters"),
        ("deduplicate.jaccard", 0 < request.deduplicate.jaccard <= 1, "a similarity above 0 and up to 1"),
        ("deduplicate.permutations", 1 <= request.deduplicate.permutations <= 4096, "1 to 4096"),
        ("contamination_words", 5 <= request.contamination_words <= 16, "5 to 16 words"),
        ("store.shard_mb", store.shard_mb > 0, "MB above 0"),
        ("store.zstd_level", 1 <= store.zstd_level <= 22, "1 to 22"),
        ("limits.document_mb", 0 < limits.document_mb <= 1024, "MB above 0, up to 1024"),
        ("limits.expansion", limits.expansion >= 1, "1 or more"),
        ("pack.length", pack.length >= 0, "tokens, 0 for none"),
        ("train.kind", train.kind in ("", *KINDS), f'{", ".join(KINDS)}, or "" for none'),
        ("train.vocabulary", 300 <= train.vocabulary <= 1_000_000, "300 to 1,000,000 tokens"),
        ("engine", request.engine in ENGINES, " or ".join(f'"{engine}"' for engine in ENGINES)),
    ):
        if not fits:
            raise ClientFault("invalid", f"{field}: this value makes no sense", f"give {wanted_}")
    for i, given in enumerate(request.inputs):
        if given.format not in ("auto", *FORMATS):
            raise ClientFault(
                "unknown_format", f"inputs[{i}].format: {given.format!r} is not known", f"known are: auto, {', '.join(FORMATS)}"
            )
        if bool(given.artifact) == bool(given.url):
            raise ClientFault("invalid", f"inputs[{i}]: give artifact or url, and not both", "a digest, or a path or URL")
    if pack.length and not (request.tokenize.tokenizer or train.kind):
        raise ClientFault("invalid", "pack.length: there are no tokens to pack", "give tokenize.tokenizer or train.kind")
    if request.tokenize.tokenizer and train.kind:
        raise ClientFault("invalid", "train.kind: tokenize.tokenizer is given too", "leave one of them out")
    for i, filter in enumerate(request.filters):
        if filter.use == "language":
            wanted(filter, f"filters[{i}]")
        elif filter.use not in RULES:
            raise ClientFault(
                "invalid", f"filters[{i}].use: {filter.use!r} is no filter", f"give one of language, {', '.join(RULES)}"
            )
    rules(request.filters)
    check_steps(request.steps or as_steps(request.clean))
    shares(request.split)
    try:
        shape(request.deduplicate.jaccard, request.deduplicate.permutations)
    except ValueError as error:
        raise ClientFault(
            "invalid", f"deduplicate.permutations: {error}", "give 128 or more, or a higher deduplicate.jaccard"
        ) from None
