"""The first steps, of one shard: read, clean, filter, look for private data and contamination, sketch. What is left goes to
`docs.arrow`, with what deduplication has to know; the books go to `book.json`, last."""

import os
import time
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path

import msgspec
import numpy as np
import pyarrow as pa

from kernelm_contracts.data import Private
from kernelm_data.corpus import kernels
from kernelm_data.corpus.arrays import binaries, fixed, strings
from kernelm_data.corpus.books import EXCERPT, Example, Lost, ShardBook, StepBook
from kernelm_data.corpus.cleaning import as_steps, cleaner
from kernelm_data.corpus.compiled import load_kernels
from kernelm_data.corpus.formats import Record, records
from kernelm_data.corpus.inputs import Piece
from kernelm_data.corpus.language import Languages, wanted
from kernelm_data.corpus.markup import html_text, pdf_text
from kernelm_data.corpus.plan import FIRST, TESTS, Plan, decoded, installed, step_names
from kernelm_data.corpus.quality import Measured, Rule, rules
from kernelm_data.corpus.sketches import Sketcher, shares_any, text_hash
from kernelm_data.corpus.streams import Broken
from kernelm_data.decode import Undecodable, decode
from kernelm_data.private.screen import Screen, reason
from kernelm_sdk.errors import PluginFault

BATCH = 8_000_000  # bytes of text in memory
SAMPLE = 2_000  # documents of a shard whose length is kept

SCHEMA = pa.schema([("id", pa.string()), ("text", pa.large_string()), ("source", pa.string()), ("label", pa.string()),
                    ("language", pa.string()), ("hash", pa.binary(16)), ("signature", pa.large_binary())])  # fmt: skip


class Batch:
    """Documents on their way to the file."""

    def __init__(self, permutations: int) -> None:
        self.ids: list[str] = []
        self.texts: list[bytes] = []
        self.sources: list[str] = []
        self.labels: list[str] = []
        self.languages: list[str] = []
        self.hashes: list[bytes] = []
        self.signatures: list[bytes] = []
        self.bytes = 0

    def add(self, id: str, text: bytes, source: str, label: str, language: str, digest: bytes, signature: bytes) -> None:
        """One more document."""
        self.ids.append(id)
        self.texts.append(text)
        self.sources.append(source)
        self.labels.append(label)
        self.languages.append(language)
        self.hashes.append(digest)
        self.signatures.append(signature)
        self.bytes += len(text)

    def record_batch(self) -> pa.RecordBatch:
        """The documents as Arrow; texts are valid UTF-8 already."""
        columns = [
            strings(self.ids),
            binaries(self.texts, pa.large_string()),
            *(strings(column) for column in (self.sources, self.labels, self.languages)),
            fixed(self.hashes, 16),
            binaries(self.signatures, pa.large_binary()),
        ]
        return pa.RecordBatch.from_arrays(columns, schema=SCHEMA)


class Steps:
    """The steps with their tools, made once a process."""

    def __init__(self, plan: Plan) -> None:
        load_kernels()
        request = plan.request
        self.plan, self.request = plan, request
        self.clean = cleaner(request.steps or as_steps(request.clean))
        self.names = step_names(request)
        self.measured = Measured()
        self.sketcher = Sketcher(request.deduplicate.permutations)
        self.signature = np.empty(request.deduplicate.permutations, np.uint32)
        self.languages = Languages() if any(filter.use == "language" for filter in request.filters) else None
        self.tests = np.load(Path(plan.work) / TESTS, mmap_mode="r") if request.test_sets else None
        found = iter(rules(request.filters))
        self.filters: list[tuple[str, Rule | None, frozenset[str], float]] = []
        for i, filter in enumerate(request.filters):
            codes = wanted(filter, f"filters[{i}]") if filter.use == "language" else (frozenset[str](), 0.0)
            self.filters.append((filter.use, None if filter.use == "language" else next(found)[1], *codes))


@lru_cache(1)
def steps_of(plan: bytes) -> Steps:
    """The tools of this process for the plan in a file's bytes."""
    return Steps(decoded(plan))


class Shard:
    """One shard on its way."""

    def __init__(self, steps: Steps) -> None:
        self.steps = steps
        self.request = steps.request
        self.books = {name: StepBook(name) for name in steps.names}
        self.book = ShardBook(list(self.books.values()))
        self.lost = Lost()
        self.batch = Batch(self.request.deduplicate.permutations)
        self.screen = Screen(self.request.private, steps.plan.key) if self.request.private else None
        self.excerpts = Screen(Private())  # so that no report shows private data

    def excerpt(self, text: bytes) -> str:
        """The beginning of a text, without private data."""
        start = text[: EXCERPT * 4].decode("utf-8", "ignore")[:EXCERPT]
        return self.excerpts(start).text or ""

    def drop(self, step: str, id: str, why: str, text: bytes, detail: str = "") -> None:
        book = self.books[step]
        book.drop(why)
        if book.wants(why):
            book.show(why, Example(id, self.excerpt(text)))
        self.lost.add(id, step, why, detail)

    def read(self, record: Record) -> bytes | None:
        """The text of a record as UTF-8, or None if it can't be read."""
        book = self.books["read"]
        book.documents_in += record.count
        self.book.sources[record.format] = self.book.sources.get(record.format, 0) + record.count
        try:
            if record.broken:
                raise Broken(record.broken, record.detail)
            text = self._text(record)
        except (Broken, Undecodable) as error:
            book.drop(error.reason, record.count)
            if book.wants(error.reason):
                book.show(error.reason, Example(record.id, error.detail))
            if not record.skipped:
                self.book.broken += record.count
                self.book.broken_examples = [*self.book.broken_examples, f"{record.id} ({error})"][:5]
            self.lost.add(record.id, "read", error.reason, error.detail)
            return None
        book.documents_out += record.count
        return text

    def _text(self, record: Record) -> bytes:
        if record.kind == "pdf":
            return pdf_text(record.data if isinstance(record.data, bytes) else record.data.encode()).encode("utf-8", "replace")
        if record.kind == "html":
            text, notes = html_text(record.data)
            for note in notes:
                self.books["read"].change(note)
            return text.encode("utf-8", "replace")
        if isinstance(record.data, str):
            try:
                return record.data.encode()
            except UnicodeEncodeError as error:
                raise Broken("broken utf-8", str(error)) from None
        if record.data.isascii() and b"\0" not in record.data:
            return decode(record.data) and record.data
        text, encoding = decode(record.data)
        if encoding == "utf-8" and not record.data.startswith(b"\xef\xbb\xbf"):
            return record.data
        if encoding != "utf-8":
            self.books["read"].change(f"decoded from {encoding}")
        return text.encode("utf-8", "replace")

    def take(self, record: Record) -> None:
        """Bring one record through the steps."""
        text = self.read(record)
        if text is None:
            return
        cleaned = self._clean(record, text)
        if cleaned is None:
            return
        filtered = self._filter(record, cleaned)
        if filtered is None:
            return
        text, language = filtered
        if self.screen is not None:
            screened = self._private(record, text)
            if screened is None:
                return
            text = screened
        if not self._hooked(record, text):
            return
        array = np.frombuffer(text, np.uint8)
        if self.steps.tests is not None:
            book = self.books["contamination"]
            book.documents_in += 1
            if shares_any(self.steps.sketcher.grams(array, self.request.contamination_words), self.steps.tests):
                self.drop("contamination", record.id, f"shares {self.request.contamination_words} words with a test set", text)
                return
            book.documents_out += 1
        self._add(record, text, array, language)

    def _clean(self, record: Record, text: bytes) -> bytes | None:
        book = self.books["clean"]
        book.documents_in += 1
        cleaned, changes = self.steps.clean(text)
        least = self.request.clean.min_characters
        if len(cleaned) < least or (len(cleaned) < 4 * least and len(cleaned.decode()) < least):
            self.drop("clean", record.id, f"shorter than {least} characters", cleaned)
            return None
        for change in changes:
            book.change(change)
            if book.wants(change) and change not in ("whitespace collapsed",):
                book.show(change, Example(record.id, *self._around(text, cleaned)))
        book.documents_out += 1
        return cleaned

    def _around(self, before: bytes, after: bytes) -> tuple[str, str]:
        """Both texts from shortly before the first place where they differ."""
        size = min(len(before), len(after))
        differ = np.flatnonzero(np.frombuffer(before, np.uint8, size) != np.frombuffer(after, np.uint8, size))
        start = max(int(differ[0]) - 40 if differ.size else 0, 0)
        return self.excerpt(before[start:]), self.excerpt(after[start:]) or "(nothing)"

    def _filter(self, record: Record, text: bytes) -> tuple[bytes, str] | None:
        language = ""
        if not self.steps.filters:
            return text, language
        measured = self.steps.measured
        measured.take(np.frombuffer(text, np.uint8))
        for name, rule, codes, confidence in self.steps.filters:
            book = self.books[name]
            book.documents_in += 1
            if rule is None:
                assert self.steps.languages is not None
                language, score = self.steps.languages(text)
                self.book.languages[language] = self.book.languages.get(language, 0) + 1
                if language not in codes or score < confidence:
                    why = f"language {language}" if language not in codes else f"language uncertain (below {confidence:g})"
                    self.drop(name, record.id, why, text, f"{language} {score:.2f}")
                    return None
            else:
                verdict = rule(measured)
                if verdict.reason:
                    self.drop(name, record.id, verdict.reason, text)
                    return None
                if verdict.text is not None:
                    after = verdict.text.tobytes()
                    book.change(verdict.what)
                    if book.wants(verdict.what):
                        book.show(verdict.what, Example(record.id, *self._around(text, after)))
                    text = after
                    measured.take(verdict.text)
            book.documents_out += 1
        return text, language

    def _hooked(self, record: Record, text: bytes) -> bool:
        """Whether the filters of installed distributions let a text pass. PluginFault `filter_failed` for one that raises: a corpus
        must not be filtered in part, and other shards know nothing of this one."""
        hooks = installed()
        if not hooks:
            return True
        decoded = text.decode()
        reasons = dict(hooks.call("reason_against", text=decoded, label=record.label))
        if hooks.quarantined:
            name, why = next(iter(hooks.quarantined.items()))
            raise PluginFault("filter_failed", f"filter {name!r}: {why}", "repair or uninstall the distribution that brings it")
        for name in hooks.names:
            book = self.books[f"filter {name}"]
            book.documents_in += 1
            if reason := reasons.get(name):
                self.drop(book.name, record.id, str(reason), text)
                return False
            book.documents_out += 1
        return True

    def _private(self, record: Record, text: bytes) -> bytes | None:
        assert self.screen is not None
        book = self.books["private"]
        book.documents_in += 1
        decoded = text.decode()
        clean, found = self.screen(decoded, record.id)
        if clean is None:
            self.drop("private", record.id, reason(found), b"")
            return None
        done = "found" if self.screen.settings.action == "report" else "redacted"
        for kind in found:
            book.change(f"{kind} {done}")
        book.documents_out += 1
        return text if clean is decoded else clean.encode()

    def _add(self, record: Record, text: bytes, array: kernels.Bytes, language: str) -> None:
        batch, steps = self.batch, self.steps
        steps.sketcher.signature(steps.sketcher.grams(array), steps.signature)
        id = record.id.encode("utf-8", "replace").decode()
        batch.add(id, text, record.format, record.label, language, text_hash(text), steps.signature.tobytes())
        self.book.text_bytes += len(text)
        if len(self.book.lengths) < SAMPLE:
            self.book.lengths.append(len(text))

    def close(self) -> ShardBook:
        """The books, complete."""
        if self.screen is not None:
            card = self.screen.card([])
            self.book.private_documents, self.book.private_affected = card.documents, card.affected
            self.book.private_found = card.found
            self.book.private_reported = self.screen.reported
        return self.book


def first(path: str, number: int, pieces: Sequence[Piece], poison: Sequence[str] = ()) -> int:
    """Bring the shard `number` through the first steps of the plan in the file `path`; bytes read. `poison`: ids of documents that
    killed a process before; they are quarantined."""
    began = time.monotonic()
    steps = steps_of(Path(path).read_bytes())
    plan = steps.plan
    folder = Path(plan.work) / FIRST / f"{number:05}"
    folder.mkdir(parents=True, exist_ok=True)
    shard = Shard(steps)
    with pa.OSFile(str(folder / "docs.arrow"), "wb") as sink, pa.ipc.new_file(sink, SCHEMA) as writer:
        for record in _watched(folder, pieces, plan, frozenset(poison)):
            shard.take(record)
            if shard.batch.bytes > BATCH:
                writer.write_batch(shard.batch.record_batch())
                shard.batch = Batch(plan.request.deduplicate.permutations)
        if shard.batch.ids:
            writer.write_batch(shard.batch.record_batch())
    (folder / "dropped.jsonl").write_bytes(shard.lost.data)
    book = shard.close()
    book.bytes_in = sum(piece.size for piece in pieces)
    book.seconds = time.monotonic() - began
    temporary = folder / "book.json.part"
    temporary.write_bytes(msgspec.json.encode(book))
    temporary.replace(folder / "book.json")
    return book.bytes_in


def _watched(folder: Path, pieces: Sequence[Piece], plan: Plan, poison: frozenset[str]) -> Iterator[Record]:
    """The records of the pieces. The id of one whose parser might kill the process is written down before."""
    mark = os.open(folder / "parsing", os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        for piece in pieces:
            for record in records(piece, plan.inputs[piece.input], plan.request.limits):
                if record.id in poison:
                    record.broken, record.data = "kills its parser", b""
                elif record.kind != "text" and not record.broken:
                    name = record.id.encode("utf-8", "replace")
                    os.pwrite(mark, len(name).to_bytes(4, "little") + name, 0)
                yield record
    finally:
        os.close(mark)
