"""The pipeline over masses of text: inputs to a dataset with a manifest, a card and a report.

1. `first`, on all cores, a shard at a time: read, clean, filter, private data, contamination, signatures.
2. `near`, once: which documents stay, and in which split.
3. `second`, on all cores: tokenize, pack, write.

What a shard left is a folder with a book that is written last, so that after a kill the work goes on with the next shard. Nothing
in the dataset tells the time: the same inputs, request and library versions give the same bytes.
"""

import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import msgspec
import numpy as np

from kernelm_contracts.data import DatasetCard, Input, Manifest, PrepareRequest
from kernelm_data.corpus import pool
from kernelm_data.corpus.assemble import assemble
from kernelm_data.corpus.books import ShardBook, StepBook
from kernelm_data.corpus.compiled import load_kernels
from kernelm_data.corpus.first import first
from kernelm_data.corpus.inputs import Piece, pieces, shards
from kernelm_data.corpus.near import Outcome, deduplicate
from kernelm_data.corpus.others import sketch_dataset, test_table
from kernelm_data.corpus.plan import FIRST, KEEP, TESTS, Plan, check_request, step_names
from kernelm_data.corpus.second import SECOND, second
from kernelm_data.corpus.store import Documents
from kernelm_data.corpus.tokenizing import examine, load, separator
from kernelm_data.corpus.training import train
from kernelm_sdk.errors import ClientFault

Say = Callable[[float, str, str, float], None]  # fraction of the job, phase, message, MB/s
SPANS = {"read": (0.02, 0.55), "deduplicate": (0.55, 0.65), "store": (0.65, 0.97)}
SAMPLE = 256  # documents on which Gigatoken has to give the ids of Hugging Face's tokenizers
SAVE_S = 30.0  # between two checkpoints


class Sources(msgspec.Struct, frozen=True):
    """Where the artifacts of the request lie on this machine."""

    inputs: tuple[Input, ...]
    folders: tuple[Path | None, ...]  # of each input that is an artifact
    tokenizer: Path | None = None
    against: tuple[Path, ...] = ()
    test_sets: tuple[Path, ...] = ()
    parent: Path | None = None


class Meter:
    """Says how far a phase is: MB/s and time left."""

    def __init__(self, say: Say, phase: str, total: int, done: int) -> None:
        self._say, self._phase, self._total, self._before = say, phase, max(total, 1), done
        self._done = done
        self._start = time.monotonic()
        self.at(0)

    def at(self, more: int) -> None:
        """`more` bytes are through."""
        self._done += more
        low, high = SPANS[self._phase]
        seconds = time.monotonic() - self._start
        rate = (self._done - self._before) / max(seconds, 1e-9)
        left = f", {(self._total - self._done) / rate:,.0f} s left" if rate > 0 else ""
        self._say(low + (high - low) * self._done / self._total, self._phase,
                  f"{self._done / 1e6:,.0f} of {self._total / 1e6:,.0f} MB{left}", round(rate / 1e6, 2))  # fmt: skip


class Saver:
    """Hands finished shards to `save` now and then: folders relative to the work folder."""

    def __init__(self, save: Callable[[list[str]], None] | None) -> None:
        self._save, self._new, self._last = save, list[str](), time.monotonic()

    def add(self, folder: str) -> None:
        self._new.append(folder)
        if self._save is not None and time.monotonic() - self._last >= SAVE_S:
            self._save(self._new)
            self._new, self._last = [], time.monotonic()


def prepare(sources: Sources, request: PrepareRequest, work: Path, out: Path, say: Say, *, workers: int = 0, key: bytes = b"",
            save: Callable[[list[str]], None] | None = None, engine: pool.Engine | None = None) -> DatasetCard:  # fmt: skip
    """Read the inputs, write the dataset into the empty folder `out`, and return its card.

    `work`: a folder for what lies between; shards that are complete in it are not done again. `engine` runs the shards; without one
    `workers` processes do, 0 for none but this one. `say` is called often, and may raise to stop. `save` is told the folders in
    `work` that are complete since it was told last.
    """
    check_request(request)
    request = msgspec.structs.replace(request, engine="local")  # what comes out hangs on no engine, and so does not name it
    engine = engine or (pool.Crew(workers) if workers else pool.Here())
    try:
        with pool.rare_collections():
            load_kernels()
            return _prepare(sources, request, work, out, say, engine, key, save)
    finally:
        engine.stop()


def _prepare(sources: Sources, request: PrepareRequest, work: Path, out: Path, say: Say, engine: pool.Engine, key: bytes,
             save: Callable[[list[str]], None] | None) -> DatasetCard:  # fmt: skip
    say(0.0, "read", "looking at the inputs", 0.0)
    found = shards(pieces(sources.inputs, sources.folders, request.store), request.store)
    plan = _plan(sources, request, work, out, key)
    _same_inputs(work, found, request)
    path = str(work / "plan-first.msgpack")  # read once a process
    saver = Saver(save)

    if request.test_sets:
        np.save(work / TESTS, test_table(sources.test_sets, request.contamination_words))
    others = [sketch_dataset(folder, work / "others" / f"{i:03}", request.deduplicate.permutations)
              for i, folder in enumerate((*sources.against, *([sources.parent] if sources.parent else [])))]  # fmt: skip
    _write_plan(path, plan)
    book = _first(path, work, found, say, engine, saver, request)
    check_broken(book, request)

    say(SPANS["deduplicate"][0], "deduplicate", "hashes and bands", 0.0)
    outcome = _near(work, others, len(found), request, plan, say)
    plan = _tokenizer(plan, sources, request, work, out, outcome, say)
    path = str(work / "plan-second.msgpack")
    _write_plan(path, plan)
    _second(path, work, len(found), say, engine, saver)
    say(0.97, "store", "manifest, card, report", 0.0)
    card = assemble(plan, sources.parent, work, out, len(found), book, outcome)
    say(1.0, "store", f"{sum(s.documents for s in card.splits.values()):,} documents", 0.0)
    return card


def _plan(sources: Sources, request: PrepareRequest, work: Path, out: Path, key: bytes) -> Plan:
    number = 0
    if sources.parent is not None:
        manifest = read_manifest(sources.parent)
        number = 1 + max((int(Path(shard.path).stem) for shard in manifest.shards), default=-1)
    return Plan(request, str(work), str(out), sources.inputs, key=key, number=number)


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a corpus; ClientFault `not_a_corpus` if there is none."""
    try:
        return msgspec.json.decode((folder / "manifest.json").read_bytes(), type=Manifest)
    except (FileNotFoundError, msgspec.DecodeError) as error:
        raise ClientFault(
            "not_a_corpus",
            f"store.append_to: manifest.json: {error}",
            'give the digest of a dataset that was prepared with another format than "folders"',
        ) from None


def _write_plan(path: str, plan: Plan) -> None:
    with open(path, "wb", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:  # it may hold a key
        file.write(msgspec.msgpack.encode(plan))


def _same_inputs(work: Path, found: Sequence[Sequence[Piece]], request: PrepareRequest) -> None:
    """What lies in the work folder is of use only if the inputs are what they were; else all is read again."""
    listing = [[(p.id, p.format, p.packing, p.size, p.stamp, p.start, p.stop, p.skipped) for p in shard] for shard in found]
    mine = hashlib.sha256(msgspec.json.encode((listing, request))).hexdigest()
    note = work / "inputs.sha256"
    if note.exists() and note.read_text() != mine:
        for folder in (FIRST, SECOND):
            shutil.rmtree(work / folder, ignore_errors=True)
        (work / "tokenizer.json").unlink(missing_ok=True)  # trained on other text
    work.mkdir(parents=True, exist_ok=True)
    note.write_text(mine)


def _first(path: str, work: Path, found: Sequence[Sequence[Piece]], say: Say, engine: pool.Engine, saver: Saver,
           request: PrepareRequest) -> ShardBook:  # fmt: skip
    sizes = [sum(piece.size for piece in shard) for shard in found]
    todo = [(n, shard) for n, shard in enumerate(found) if not (work / FIRST / f"{n:05}" / "book.json").exists()]
    done = sum(sizes) - sum(sizes[n] for n, _ in todo)
    meter = Meter(say, "read", sum(sizes), done)
    for number, _ in engine.run(first, path, todo, lambda n: work / FIRST / f"{n:05}", lambda: meter.at(0)):
        meter.at(sizes[number])
        saver.add(f"{FIRST}/{number:05}")
    book = ShardBook([StepBook(name) for name in step_names(request)])
    for number in range(len(found)):
        book.add(msgspec.json.decode((work / FIRST / f"{number:05}" / "book.json").read_bytes(), type=ShardBook))
    return book


def check_broken(book: ShardBook, request: PrepareRequest) -> None:
    """ClientFault `too_many_broken` if more documents than `max_broken` allows can't be read."""
    read = book.steps[0].documents_out
    if book.broken and book.broken > request.max_broken * (book.broken + read):
        raise ClientFault(
            "too_many_broken",
            f"{book.broken} of {book.broken + read} documents can't be read, more than max_broken = "
            f"{request.max_broken:g} allows: {'; '.join(book.broken_examples)}",
            "repair or remove them, or raise max_broken",
            broken=book.broken,
        )


def _near(work: Path, others: list[Path], count: int, request: PrepareRequest, plan: Plan, say: Say) -> Outcome:
    low, high = SPANS["deduplicate"]

    def at(done: int, total: int) -> None:
        say(low + (high - low) * (done / max(total, 1)), "deduplicate", f"{done:,} of {total:,} candidates", 0.0)

    files = [*others, *(work / FIRST / f"{n:05}" / "docs.arrow" for n in range(count))]
    outcome = deduplicate(files, len(others), request.deduplicate, request.split, plan.form, at)
    (work / KEEP).mkdir(exist_ok=True)
    for number, assigned in enumerate(outcome.assigned):
        np.save(work / KEEP / f"{number:05}.npy", assigned)
    return outcome


def _kept_texts(work: Path, outcome: Outcome, most: int) -> Iterator[bytes]:
    """The texts of documents of the training split, until they are `most` bytes."""
    size = 0
    for number, assigned in enumerate(outcome.assigned):
        documents = Documents(work / FIRST / f"{number:05}" / "docs.arrow")
        for row in np.flatnonzero(assigned == 0).tolist():
            if size >= most:
                return
            text = documents.text(row).tobytes()
            size += len(text)
            yield text


def _tokenizer(plan: Plan, sources: Sources, request: PrepareRequest, work: Path, out: Path, outcome: Outcome, say: Say) -> Plan:
    """The plan with a tokenizer in `out` and its facts."""
    parent = sources.parent / "tokenizer.json" if sources.parent else None
    given = sources.tokenizer / "tokenizer.json" if sources.tokenizer else None
    if given is None and not request.train.kind and parent is not None and parent.exists():
        given = parent
    if given is None and not request.train.kind:
        return plan
    if request.train.kind and (kept := work / "tokenizer.json").exists():
        given = kept  # trained before the process was killed
    if given is not None:
        if not given.is_file():
            raise ClientFault("no_tokenizer", "tokenize.tokenizer: the artifact has no tokenizer.json",
                              "give the digest of an artifact with a Hugging Face tokenizer.json at its top")  # fmt: skip
        tokenizer = load(given)
    else:
        say(SPANS["deduplicate"][1], "store", f"training a tokenizer of {request.train.vocabulary:,} tokens", 0.0)
        most = int(request.train.sample_mb * 1e6)
        tokenizer = train(request.train, lambda: (text.decode() for text in _kept_texts(work, outcome, most)))
        tokenizer.save(str(work / "tokenizer.json"))
    path = work / "encoder" / "tokenizer.json"  # where workers find it
    path.parent.mkdir(exist_ok=True)
    tokenizer.save(str(path))
    shutil.copyfile(path, out / "tokenizer.json")
    facts, _ = examine(tokenizer, path, list(islice(_kept_texts(work, outcome, 250_000), SAMPLE)))
    between = separator(tokenizer, request.pack.separator) if request.pack.length else 0
    return msgspec.structs.replace(plan, tokens=facts, separator=between)


def _second(path: str, work: Path, count: int, say: Say, engine: pool.Engine, saver: Saver) -> None:
    sizes = [(work / FIRST / f"{n:05}" / "docs.arrow").stat().st_size for n in range(count)]
    todo = [(n,) for n in range(count) if not (work / SECOND / f"{n:05}" / "book.json").exists()]
    meter = Meter(say, "store", sum(sizes), sum(sizes) - sum(sizes[n] for (n,) in todo))
    for number, _ in engine.run(second, path, todo, lambda n: work / SECOND / f"{n:05}", lambda: meter.at(0)):
        meter.at(sizes[number])
        saver.add(f"{SECOND}/{number:05}")
