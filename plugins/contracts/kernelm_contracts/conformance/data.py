"""`data/1`: the same source gives the same dataset, every document is accounted for, and nothing is in two splits."""

import importlib.util
import re
import tempfile
from pathlib import Path
from typing import Any

import msgspec

from kernelm.testing.conformance.check import Case, Checks
from kernelm.testing.conformance.driver import Attempt
from kernelm.testing.conformance.results import Failed, Skipped
from kernelm_contracts.data import DatasetCard, Prepared, Redacted
from kernelm_sdk.errors import FaultBody
from kernelm_sdk.system import ArtifactName, Artifacts, OpenArtifact

checks = Checks()
DOCUMENTS = 40  # of each class, without the copies
COPIES = 6
PERSON = ("jane.roe@example.org", "+1 202 555 0147", "4111 1111 1111 1111")  # of nobody: reserved for examples and tests
NOUNS = ("striker", "bank", "court", "keeper", "market", "coach", "budget", "league", "merger", "referee")


def write_source(folder: Path) -> int:
    """Two classes of texts with exact and near duplicates among them, and some that name a person; how many documents."""
    count = 0
    for label, verb in (("sport", "plays"), ("business", "trades")):
        (folder / label).mkdir(parents=True)
        for n in range(DOCUMENTS + COPIES):
            k = n % DOCUMENTS  # the last ones are copies of the first
            words = [f"{NOUNS[(k * 7 + j * 3) % 10]}{(k * 31 + j * 17) % 97}" for j in range(24)]
            ending = " Updated." if n >= DOCUMENTS and n % 2 else ""  # a near duplicate
            (folder / label / f"{n:03}.txt").write_text(f"The {words[0]} {verb}: {' '.join(words)}.{ending}\n")
            count += 1
        for n, who in enumerate(PERSON):  # one that is kept where nothing keeps it out, and one that is too short to be
            long = f"{NOUNS[n]} of number {n} {verb} again, and asks everybody to answer by {who} before the end of the season"
            (folder / label / f"person-{n}.txt").write_text(f"The {long}.\n")
            (folder / label / f"short-{n}.txt").write_text(f"{who[:19]}\n")
            count += 2
    return count


async def prepare(case: Case) -> None:
    """A source, where the author gives none."""
    if "source" not in case.artifacts and case.stand.has_store:
        scratch = case.stand.system.home / "scratch"
        scratch.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=scratch) as folder:
            write_source(Path(folder))
            case.artifacts["source"] = await case.stand.store(Path(folder), "source")
    if "source" in case.artifacts:
        case.requests.setdefault("data/1.prepare", {"source": "@source", "name": "checked"})


async def prepared(case: Case, **changes: Any) -> tuple[Prepared, Attempt]:
    """Prepare the sample, with changes to the request."""
    attempt = await attempted(case, **changes)
    final = attempt.final
    if final is None or final.result is None:
        raise Failed("`prepare` ended without a result", attempt.text)
    return msgspec.convert(final.result, Prepared), attempt


async def attempted(case: Case, **changes: Any) -> Attempt:
    """The job at its end, whatever that is; or refused at once, as `refusal` says."""
    from kernelm.testing.conformance.jobs import finished

    if "data/1.prepare" not in case.requests:
        raise Skipped("no source: the artifact store (kernelm-artifacts) is not installed, and conformance.toml gives none")
    request = {**case.requests["data/1.prepare"], **changes}
    attempt = await case.stand.driver.hand(case.main.wire, "data/1", "prepare", request)
    if refusal(attempt) is None:
        await finished(attempt)
    return attempt


def refusal(attempt: Attempt) -> FaultBody | None:
    """The client's fault that a job was refused with, at once or as its report."""
    faults = (attempt.dispatched and attempt.dispatched.fault, attempt.final and attempt.final.fault)
    return next((fault for fault in faults if fault and fault.whose == "client" and not fault.retriable), None)


async def tables(case: Case, dataset: str) -> dict[str, Any]:
    """Split -> pyarrow table."""
    if importlib.util.find_spec("pyarrow") is None:
        raise Skipped("pyarrow is not installed here: pip install pyarrow")
    from pyarrow import parquet

    opened: OpenArtifact = await case.stand.bus().call(Artifacts.open, ArtifactName(dataset), timeout_s=60.0)
    return {file.stem: parquet.read_table(file) for file in sorted(Path(opened.path).glob("*.parquet"))}


@checks.add(
    "data.digest",
    "the same source and request give the same dataset, byte for byte",
    "sort what has no order, seed what is random, write no times into the files",
)
async def digest(case: Case) -> None:
    first, _ = await prepared(case)
    second, attempt = await prepared(case)
    if first.dataset != second.dataset:
        raise Failed(f"twice the same request: {first.dataset}, then {second.dataset}", attempt.text)


@checks.add(
    "data.account",
    "accounts for every document: each step's figures add up, and the splits hold what is left",
    "documents_out = documents_in - sum(reasons); the next step takes what came out; splits sum to `documents`",
)
async def account(case: Case) -> None:
    result, attempt = await prepared(case)
    if sum(result.splits.values()) != result.documents:
        raise Failed(
            f"the splits hold {sum(result.splits.values())} documents, and `documents` is {result.documents}", attempt.text
        )
    before = None
    for step in result.card.steps:
        dropped = sum(step.reasons.values())
        if step.documents_in - dropped != step.documents_out:
            raise Failed(f"step {step.name!r}: {step.documents_in} in, {dropped} dropped, {step.documents_out} out",
                         attempt.text)  # fmt: skip
        if before is not None and step.documents_in != before:
            raise Failed(f"step {step.name!r} takes {step.documents_in}, and {before} came out of the one before", attempt.text)
        before = step.documents_out
    if before is not None and before != result.documents:
        raise Failed(f"{before} documents came out of the last step, and `documents` is {result.documents}", attempt.text)


@checks.add(
    "data.tables",
    "writes the columns of the contract, and as many documents as its card says",
    "kernelm_contracts/data.py says what a dataset holds",
)
async def content(case: Case) -> None:
    result, attempt = await prepared(case)
    found = await tables(case, result.dataset)
    if {name: t.num_rows for name, t in found.items()} != result.splits:
        raise Failed(f"the files hold { {n: t.num_rows for n, t in found.items()} } documents, and `splits` says {result.splits}",
                     attempt.text)  # fmt: skip
    for name, table in found.items():
        if not {"id", "text", "label"} <= set(table.column_names):
            raise Failed(f"{name}.parquet has the columns {table.column_names}", attempt.text)
        if any(not 0 <= n < len(result.labels) for n in table.column("label").to_pylist()):
            raise Failed(f"{name}.parquet has a label that is none of {result.labels}", attempt.text)


@checks.add(
    "data.leakage",
    "no document is in two splits, nor a near duplicate of it",
    "deduplicate before splitting, or put all copies into one split",
)
async def leakage(case: Case) -> None:
    result, attempt = await prepared(case)
    where = dict[str, str]()
    grams = list[tuple[str, set[tuple[str, ...]]]]()
    for name, table in (await tables(case, result.dataset)).items():
        for text in table.column("text").to_pylist():
            words = re.findall(r"\w+", text.lower())
            key = " ".join(words)
            if where.setdefault(key, name) != name:
                raise Failed(f"a text is in {where[key]!r} and in {name!r}: {text[:80]!r}", attempt.text)
            mine = {tuple(words[k : k + 5]) for k in range(max(len(words) - 4, 1))}
            for other, theirs in grams:
                if other != name and len(mine & theirs) >= 0.8 * len(mine | theirs):
                    raise Failed(f"a text in {name!r} has a near duplicate in {other!r}: {text[:80]!r}", attempt.text)
            grams.append((name, mine))


@checks.add(
    "data.discreet",
    "no text of a document is in a card, a report, an event, a fault or the log, above all nothing that names a person",
    "say which document by its id: cards and events are read by more people than the texts are",
)
async def discreet(case: Case) -> None:
    if "source" in case.subject.samples.artifacts:
        raise Skipped("the source is the author's own: which of it names a person is not known here")
    result, attempt = await prepared(case)
    opened: OpenArtifact = await case.stand.bus().call(Artifacts.open, ArtifactName(result.dataset), timeout_s=60.0)
    exchange = await case.call("data/1", "describe", {"digest": result.dataset})
    places = [("a report", msgspec.json.encode(report)) for _, report in attempt.reports]
    places += [(f"a message on {subject}", body) for subject, body, *_ in case.main.tap.messages]
    places += [("the answer of `describe`", reply.body) for reply in exchange.replies]
    places += [("the description of the artifact", msgspec.json.encode(opened.artifact)), ("its log", case.main.log.read_bytes())]
    places += [(file.name, file.read_bytes()) for name in ("*.json", "*.md") for file in Path(opened.path).glob(name)
               if file.name != "tokenizer.json"]  # fmt: skip
    for what, text in places:
        if found := next((who for who in PERSON if who[:19].encode() in text), None):
            raise Failed(f"{what} holds {found!r} of a document", attempt.text)


@checks.add(
    "data.private",
    "where it takes a request with `private`, no private value is left in the dataset's texts, and the card counts what was found",
    "redact or quarantine before anything is written, or refuse a request that has `private` with a client's fault",
)
async def private(case: Case) -> None:
    if "source" in case.subject.samples.artifacts:
        raise Skipped("the source is the author's own: which of it names a person is not known here")
    for action in ("redact", "quarantine"):
        attempt = await attempted(case, private={"action": action})
        if (fault := refusal(attempt)) is not None:
            raise Skipped(f"it does not look for private data, and says so: {fault.message}")
        result, attempt = await prepared(case, private={"action": action})
        for name, table in (await tables(case, result.dataset)).items():
            if found := next((who for who in PERSON for text in table.column("text").to_pylist() if who in text), None):
                raise Failed(f"action {action!r}: {name}.parquet holds {found!r}", attempt.text)
        books = result.card.private
        if books is None or books.left or not {"email", "phone", "card"} <= set(books.found):
            raise Failed(f"action {action!r}: the card says {books}, and an e-mail address, a phone and a card number were there",
                         attempt.text)  # fmt: skip
    exchange = await case.call("data/1", "redact", {"texts": [f"Write to {', '.join(PERSON)}.", "Nobody."]})
    if exchange.answered:
        answer = msgspec.convert(exchange.body, Redacted)
        if len(answer.texts) != 2 or answer.texts[1] != "Nobody." or any(who in answer.texts[0] for who in PERSON):
            raise Failed("`redact` leaves private values, or changes a text that has none", exchange.text)


@checks.add("data.describe", "describes a stored dataset as it did when it made it", "read dataset.json of the artifact")
async def describe(case: Case) -> None:
    result, _ = await prepared(case)
    exchange = await case.call("data/1", "describe", {"digest": result.dataset})
    if not exchange.answered or msgspec.convert(exchange.body, DatasetCard) != result.card:
        raise Failed("`describe` does not give the card of `prepare`", exchange.text)


@checks.add(
    "data.labels",
    "refuses a source whose classes are not those that `expect_labels` names, with a client's fault",
    "compare before any work is done",
)
async def labels(case: Case) -> None:
    attempt = await attempted(case, expect_labels=["sport", "poetry"])
    if refusal(attempt) is None:
        raise Failed("other classes than expected are not refused with a client's fault", attempt.text)
