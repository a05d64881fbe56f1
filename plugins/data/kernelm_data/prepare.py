"""The pipeline over folders: source in, dataset out. No bus, no clock in what it writes: the same source, request and
library versions give the same bytes."""

import difflib
import math
from collections import Counter
from pathlib import Path

import msgspec
import numpy as np

from kernelm_contracts.data import DatasetCard, PrepareRequest, PrivateCard, SplitCard, Step
from kernelm_data import tokens
from kernelm_data.account import Document, Dropped, Meter, Report, Tally
from kernelm_data.clean import FORMS, cleaner
from kernelm_data.decode import Undecodable, decode
from kernelm_data.duplicates import Pair, Shingles, bands, find_exact, find_near
from kernelm_data.hooks import filtered
from kernelm_data.leakage import check_leakage
from kernelm_data.private.screen import Screen, reason
from kernelm_data.readers import Source, find_reader
from kernelm_data.split import SPLITS, assign, check_classes, shares
from kernelm_data.write import Dataset, Row, write
from kernelm_sdk.errors import ClientFault

QUANTILES = (5, 25, 50, 75, 95, 100)  # percent
CORPUS = ("inputs", "steps", "filters", "against", "test_sets", "contamination_words", "train", "pack", "store", "limits", "engine")
SPANS = {"read": (0.0, 0.1), "clean": (0.1, 0.22), "private": (0.22, 0.25), "deduplicate": (0.25, 0.45), "check": (0.45, 0.55),
         "tokenize": (0.55, 0.9)}  # fmt: skip - measured shares of the time


def check_request(request: PrepareRequest) -> None:
    """ClientFault, naming the field, for values that no source could satisfy."""
    for field, fits, wanted in (
        ("name", request.name.strip() != "", "a name"),
        ("max_broken", 0 <= request.max_broken <= 1, "a share from 0 to 1"),
        ("clean.normalize", request.clean.normalize in ("", *FORMS), f"one of {', '.join(FORMS)}, or an empty string"),
        ("clean.min_characters", request.clean.min_characters >= 0, "0 or more characters"),
        ("deduplicate.jaccard", 0 < request.deduplicate.jaccard <= 1, "a similarity above 0 and up to 1"),
        ("deduplicate.permutations", 1 <= request.deduplicate.permutations <= 4096, "1 to 4096"),
        ("tokenize.max_tokens", request.tokenize.max_tokens >= 1, "1 token or more"),
    ):
        if not fits:
            value = msgspec.to_builtins(request)
            for part in field.split("."):
                value = value[part]
            raise ClientFault("invalid", f"{field}: {value!r} makes no sense", f"give {wanted}")
    default = PrepareRequest("")
    for field in CORPUS:
        if getattr(request, field) != getattr(default, field):
            raise ClientFault("invalid", f'{field}: format "folders" knows no such thing',
                              'leave it out, or give another format, such as "auto", which makes a corpus')
    bands(request.deduplicate.jaccard, request.deduplicate.permutations)
    shares(request.split)
    find_reader(request.format)


def prepare(
    source: Path, tokenizer: Path | None, out: Path, request: PrepareRequest, report: Report, key: bytes = b""
) -> DatasetCard:
    """Read `source`, write the dataset into the empty folder `out`, and return its card.

    `tokenizer`: a folder with tokenizer.json, or None for no token ids. `report` is called often, and may raise to stop.
    `key`: the secret under which private data are hashed, if the request says so.
    """
    check_request(request)
    screen = Screen(request.private, key) if request.private is not None else None
    model = tokens.load(tokenizer, request.tokenize.max_tokens) if tokenizer else None
    found = find_reader(request.format)(source)
    check_labels(found.labels, request.expect_labels)

    read, read_step, lost = _read(found, request, report)
    check_classes(found.labels, (d.label for d in read), request.split, "in the source")
    clean, clean_step, too_short = _clean(read, request, report)
    check_classes(found.labels, (d.label for d in clean), request.split, "after cleaning")
    screened: list[Step] = []
    if screen is not None:
        clean, step, private = _screen(clean, screen, report)
        screened, too_short = [step], [*too_short, *private]
        check_classes(found.labels, (d.label for d in clean), request.split, "after private data")
    clean, filters, refused = filtered(clean)
    check_classes(found.labels, (d.label for d in clean), request.split, "after the filters")
    screened, too_short = [*screened, *filters], [*too_short, *refused]
    documents, near, shingles, steps, copies = _deduplicate(clean, request, report)
    check_classes(found.labels, (d.label for d in documents), request.split, "after deduplication")

    ids = [d.id for d in documents]
    links = [*find_exact(documents).items(), *((p.first, p.second) for p in near)]
    splits = assign(ids, [d.label for d in documents], links, request.split)
    check_leakage(ids, splits, shingles, request.deduplicate.jaccard,
                  Meter(report, "check", SPANS["check"], len(ids)))

    account = [read_step, clean_step, *screened, *steps, Tally("split").step(len(ids), len(splits))]
    encoded, lengths = None, None
    if model is not None:
        encoded, lengths = tokens.encode(model, [d.text for d in documents],
                                         Meter(report, "tokenize", SPANS["tokenize"], len(ids)))
        account.append(_tokenize_step(lengths, request.tokenize.max_tokens))
    token_ids = encoded if encoded is not None else [None] * len(documents)
    rows = [Row(*row) for row in zip(documents, splits, token_ids, strict=True)]
    card = _card(request, found.labels, account, rows, screen.card(ids) if screen is not None else None)
    report(0.9, "write", "Parquet, card, pictures", 0.0)
    write(Dataset(card, request, rows, [*lost, *too_short, *copies], lengths, model), out)
    report(1.0, "write", f"{len(rows)} documents", 0.0)
    return card


def check_labels(labels: tuple[str, ...], expected: tuple[str, ...]) -> None:
    """ClientFault `unknown_label` if the classes that were found are not exactly the expected ones."""
    if not expected or set(expected) == set(labels):
        return
    problems = []
    for label in sorted(set(expected) - set(labels)):
        close = difflib.get_close_matches(label, labels, 1)
        problems.append(f"{label!r} does not exist in the source" + (f" (did you mean {close[0]!r}?)" if close else ""))
    problems += [f"{label!r} is in the source but not expected" for label in sorted(set(labels) - set(expected))]
    raise ClientFault("unknown_label", f"expect_labels: {'; '.join(problems)}",
                      f"the source has the classes {', '.join(labels)}; correct the request or the folders")


def _read(found: Source, request: PrepareRequest, report: Report) -> tuple[list[Document], Step, list[Dropped]]:
    tally = Tally("read")
    documents, broken = [], []
    for raw in Meter(report, "read", SPANS["read"], found.total).track(found.documents):
        try:
            if raw.skipped:
                tally.drop(raw.id, raw.skipped)
                continue
            if raw.broken:
                raise Undecodable(raw.broken)
            text, encoding = decode(raw.data)
        except Undecodable as error:
            tally.drop(raw.id, error.reason, detail=error.detail)
            broken.append(f"{raw.id} ({error})")
            continue
        if encoding != "utf-8":
            tally.changed[f"decoded from {encoding}"] += 1
        documents.append(Document(raw.id, raw.label, text))
    if broken and len(broken) > request.max_broken * (len(broken) + len(documents)):
        raise ClientFault("too_many_broken", f"{len(broken)} of {len(broken) + len(documents)} documents can't be read, more than "
                                             f"max_broken = {request.max_broken:g} allows: {'; '.join(broken[:5])}"
                                             + ("; ..." if len(broken) > 5 else ""),
                          "repair or remove these files, save them as UTF-8, or raise max_broken", broken=len(broken))
    return documents, tally.step(found.total, len(documents)), tally.dropped


def _clean(documents: list[Document], request: PrepareRequest, report: Report) -> tuple[list[Document], Step, list[Dropped]]:
    tally = Tally("clean")
    clean = cleaner(request.clean)
    kept = []
    for document in Meter(report, "clean", SPANS["clean"], len(documents)).track(documents):
        text, changes = clean(document.text)
        if len(text) < request.clean.min_characters:
            tally.drop(document.id, f"shorter than {request.clean.min_characters} characters")
            continue
        tally.changed.update(changes)
        kept.append(Document(document.id, document.label, text))
    return kept, tally.step(len(documents), len(kept)), tally.dropped


def _screen(documents: list[Document], screen: Screen, report: Report) -> tuple[list[Document], Step, list[Dropped]]:
    tally = Tally("private")
    done = "found" if screen.settings.action == "report" else "redacted"
    kept = []
    for document in Meter(report, "private", SPANS["private"], len(documents)).track(documents):
        text, found = screen(document.text, document.id)
        if text is None:
            tally.drop(document.id, reason(found))
            continue
        tally.changed.update(f"{kind} {done}" for kind in found)
        kept.append(Document(document.id, document.label, text))
    return kept, tally.step(len(documents), len(kept)), tally.dropped


def _deduplicate(
    documents: list[Document], request: PrepareRequest, report: Report
) -> tuple[list[Document], list[Pair], list[Shingles], list[Step], list[Dropped]]:
    """The documents that stay, those of them that are near each other (only if near duplicates stay), their shingles,
    two steps of the account, and what was dropped."""
    exact, near = Tally("deduplicate exact"), Tally("deduplicate near")
    distinct = documents
    if request.deduplicate.exact:
        copies = find_exact(documents)
        for i, first in copies.items():
            exact.drop(documents[i].id, _duplicate(documents[first], documents[i]), kept=documents[first].id)
        distinct = [d for i, d in enumerate(documents) if i not in copies]
    meter = Meter(report, "deduplicate", SPANS["deduplicate"], len(distinct))
    pairs, shingles = find_near(distinct, request.deduplicate, meter)
    steps = [exact.step(len(documents), len(distinct))]
    if not request.deduplicate.near:
        return distinct, pairs, shingles, [*steps, near.step(len(distinct), len(distinct))], exact.dropped
    for pair in pairs:
        first, second = distinct[pair.first], distinct[pair.second]
        near.drop(second.id, _duplicate(first, second), kept=first.id, jaccard=pair.jaccard)
    gone = {pair.second for pair in pairs}
    stay = [i for i in range(len(distinct)) if i not in gone]
    steps.append(near.step(len(distinct), len(stay)))
    return [distinct[i] for i in stay], [], [shingles[i] for i in stay], steps, [*exact.dropped, *near.dropped]


def _duplicate(first: Document, second: Document) -> str:
    # a text under two labels is a mistake in the source that a person should see
    return "duplicate" if first.label == second.label else "duplicate under another label"


def _tokenize_step(lengths: list[int], max_tokens: int) -> Step:
    tally = Tally("tokenize")
    if cut := sum(length > max_tokens for length in lengths):
        tally.changed[f"cut at {max_tokens} tokens"] = cut
    return tally.step(len(lengths), len(lengths))


def _card(
    request: PrepareRequest, labels: tuple[str, ...], steps: list[Step], rows: list[Row], private: PrivateCard | None
) -> DatasetCard:
    splits = {}
    for name in (n for n in SPLITS if n in shares(request.split)):
        members = [row for row in rows if row.split == name]
        per_label = Counter(row.document.label for row in members)
        count = sum(len(row.input_ids) for row in members if row.input_ids is not None)
        splits[name] = SplitCard(len(members), count, {label: per_label[label] for label in labels})
    lengths = np.array([len(row.document.text) for row in rows])
    characters = {f"p{q}": float(math.floor(np.percentile(lengths, q))) for q in QUANTILES}
    return DatasetCard(request.name, labels, tuple(steps), splits, request.tokenize.max_tokens,
                       request.tokenize.tokenizer, characters, request.source, private)
