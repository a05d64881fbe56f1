"""`kernelm data describe | preview | search | diff`: what is in a dataset, without reading more of it than is asked for.

A dataset is named by its digest, by the beginning of it, by its name (then the newest), or by a folder.
"""

import asyncio
import hashlib
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Annotated, Any

import msgspec
from cyclopts import App, Parameter
from rich.text import Text

from kernelm_cli.results import short
from kernelm_cli.session import Output, connection, print_json, stdout
from kernelm_cli.tables import columns
from kernelm_contracts.data import DatasetCard, Manifest, ShardFile
from kernelm_contracts.splits import SPLITS, files
from kernelm_sdk.errors import ClientFault
from kernelm_sdk.system import ArtifactList, ArtifactName, ArtifactQuery, Artifacts, OpenArtifact

app = App(name="data", help="The datasets: what is in them, and where it went.", version_flags=[])

BATCH = 256  # rows read at a time
WIDTH = 160  # characters of a text that are shown
BEFORE = 60  # of them before what was searched for
Dataset = Annotated[str, Parameter(name="DATASET", help="digest, beginning of a digest, name (the newest), or folder")]


def _folder(name: str, home: Path | None) -> Path:
    """Where the files of a dataset lie."""
    if (Path(name) / "dataset.json").is_file():
        return Path(name)

    async def work() -> Path:
        async with connection(home) as bus:
            found: ArtifactList = await bus.call(Artifacts.find, ArtifactQuery("dataset", 10_000))
            match = next(
                (a for a in found.artifacts if a.digest.removeprefix("sha256:").startswith(name.removeprefix("sha256:"))), None
            )
            match = match or next((a for a in found.artifacts if a.metadata.get("name") == name), None)
            if match is None:
                names = ", ".join(sorted({str(a.metadata.get("name", "")) for a in found.artifacts})) or "there is none yet"
                raise ClientFault(
                    "not_found", f"no dataset {name!r} among {len(found.artifacts)}", f"give a digest, or a name: {names}"
                )
            opened: OpenArtifact = await bus.call(Artifacts.open, ArtifactName(match.digest), timeout_s=300.0)
            return Path(opened.path)

    return asyncio.run(work())


def _card(folder: Path) -> DatasetCard:
    try:
        return msgspec.json.decode((folder / "dataset.json").read_bytes(), type=DatasetCard)
    except (OSError, msgspec.DecodeError) as error:
        raise ClientFault("not_a_dataset", f"{folder}: dataset.json: {error}", "give a dataset that data.prepare made") from None


def _batches(folder: Path, splits: tuple[str, ...], columns: list[str], size: int = BATCH,
             passed: Collection[str] = ()) -> Iterator[tuple[str, Any]]:  # fmt: skip
    """Split and record batch, `size` rows at a time, of all files but those passed over, by their paths within."""
    try:
        import pyarrow.parquet as pq
    except ModuleNotFoundError:
        raise ClientFault("not_installed", "reading datasets needs pyarrow", "pip install pyarrow") from None
    for split in splits:
        for path in files(folder, split):
            if path.relative_to(folder).as_posix() not in passed:
                file = pq.ParquetFile(path)
                wanted = [name for name in columns if name in file.schema_arrow.names]
                for batch in file.iter_batches(size, columns=wanted):
                    yield split, batch


def _splits(split: str) -> tuple[str, ...]:
    if split and split not in SPLITS:
        raise ClientFault("unknown_split", f"--split: {split!r} is no split", f"give one of {', '.join(SPLITS)}")
    return (split,) if split else SPLITS


def _shown(text: str, width: int) -> str:
    line = " ".join(text.split())
    return line if len(line) <= width else line[: width - 1] + "\N{HORIZONTAL ELLIPSIS}"


def _print_line(text: str) -> None:
    """The beginning of a text, as much as one line of the terminal takes."""
    stdout().print(Text("  " + _shown(text, WIDTH)), no_wrap=True, overflow="ellipsis")


def _around(text: str, start: int) -> str:
    """A text from a word some way before `start` on."""
    if start <= BEFORE:
        return text
    return "\N{HORIZONTAL ELLIPSIS}" + text[start - BEFORE : start].partition(" ")[2] + text[start:]


@app.command
def describe(dataset: Dataset, /, *, output: Output = Output()) -> int:
    """Show what each step did, the splits, and the version."""
    folder = _folder(dataset, output.folder)
    card = _card(folder)
    if output.json:
        print_json(card)
        return 0
    out = stdout()
    before = f"; before it: {short(card.parent)}" if card.parent else ""
    out.print(f"[bold]{card.name}[/], version {card.version}{before}"
              + (f", from {card.bytes_in / 1e6:,.1f} MB of input" if card.bytes_in else ""))  # fmt: skip
    table = columns("step", "in", "out", "dropped", "changed", right=("in", "out"))
    for step in card.steps:
        table.add_row(step.name, f"{step.documents_in:,}", f"{step.documents_out:,}", _counts(step.reasons), _counts(step.changed))
    out.print(table)
    for name, split in card.splits.items():
        labels = f" ({_counts(split.per_label)})" if split.per_label else ""
        out.print(f"{name}: {split.documents:,} documents" + (f", {split.tokens:,} tokens" if split.tokens else "") + labels)
    private = card.private
    out.print(
        "private data: nobody looked for any"
        if private is None
        else f"private data: {private.affected:,} of {private.documents:,} documents held some; left: "
        + (_counts(private.left) or "none")
    )
    pages = [name for name in ("report.html", "card.md") if (folder / name).is_file()]
    out.print(f"more in {', '.join(str(folder / name) for name in pages)}", soft_wrap=True)
    return 0


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{count:,} {what}" for what, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])))


@app.command
def preview(dataset: Dataset, /, *, rows: int = 10, split: str = "", full: bool = False, output: Output = Output()) -> int:
    """Show some documents, from the whole of the dataset."""
    folder = _folder(dataset, output.folder)
    card, chosen = _card(folder), _splits(split)
    total = sum(s.documents for name, s in card.splits.items() if name in chosen)
    step = max(total // max(rows, 1), 1)
    found: list[dict[str, Any]] = []
    at = 0
    for name, batch in _batches(folder, chosen, ["id", "text", "label", "source", "input_ids"]):
        first = -at % step
        for row in range(first, batch.num_rows, step):
            if len(found) < rows:
                found.append({"split": name} | batch.slice(row, 1).to_pylist()[0])
        at += batch.num_rows
        if len(found) >= rows:
            break
    if output.json:
        print_json(found)
        return 0
    for row in found:
        label = card.labels[row["label"]] if isinstance(row.get("label"), int) else row.get("label") or ""
        tokens = f" · {len(row['input_ids']):,} tokens" if row.get("input_ids") is not None else ""
        stdout().print(Text.assemble((row["id"], "bold"), f" · {row['split']}{' · ' + label if label else ''}{tokens}"))
        if full:
            stdout().print(Text("  " + row["text"]))
        else:
            _print_line(row["text"])
    stdout().print(f"{len(found)} of {total:,} documents")
    return 0


@app.command
def search(dataset: Dataset, pattern: str, /, *, split: str = "", most: int = 20, output: Output = Output()) -> int:
    """Find documents by a regular expression (RE2) in their text; small and capital letters are the same."""
    import pyarrow as pa
    import pyarrow.compute as pc

    folder = _folder(dataset, output.folder)
    found: list[dict[str, str]] = []
    count = documents = 0
    for name, batch in _batches(folder, _splits(split), ["id", "text"]):
        documents += batch.num_rows
        try:
            at = pc.find_substring_regex(batch.column("text"), pattern, ignore_case=True)
        except pa.ArrowInvalid as error:
            raise ClientFault("invalid", f"PATTERN: {error}", "see https://github.com/google/re2/wiki/Syntax") from None
        for row in pc.indices_nonzero(pc.greater_equal(at, 0)).to_pylist():
            count += 1
            if len(found) < most:
                text = batch.column("text")[row].as_py()
                start = len(text.encode()[: at[row].as_py()].decode("utf-8", "ignore"))  # the position is in bytes
                found.append({"split": name, "id": batch.column("id")[row].as_py(), "text": _shown(_around(text, start), WIDTH)})
    if output.json:
        print_json({"documents": documents, "matches": count, "first": found})
        return 0 if count else 1
    for row_ in found:
        stdout().print(Text.assemble((row_["id"], "bold"), f" · {row_['split']}"))
        _print_line(row_["text"])
    stdout().print(f"{count:,} of {documents:,} documents")
    return 0 if count else 1


def _same(folders: tuple[Path, Path]) -> dict[str, int]:
    """Path -> rows of the files with documents that two corpora have in common: nobody has to read them."""
    files: list[dict[str, ShardFile]] = []
    for folder in folders:
        try:
            manifest = msgspec.json.decode((folder / "manifest.json").read_bytes(), type=Manifest)
        except FileNotFoundError:  # a small dataset has none
            return {}
        files.append({shard.path: shard for shard in manifest.shards if not shard.path.startswith("packed/")})
    one, other = files
    return {path: shard.rows for path, shard in one.items() if path in other and other[path].digest == shard.digest}


def _hashes(folder: Path, passed: Collection[str]) -> dict[str, tuple[str, bytes]]:
    """Id -> split and hash of the text, of the documents in all files but those passed over."""
    result = {}
    for split, batch in _batches(folder, SPLITS, ["id", "text"], 16 * BATCH, passed):
        for id, text in zip(batch.column("id").to_pylist(), batch.column("text"), strict=True):
            result[id] = (split, hashlib.blake2b(text.as_buffer(), digest_size=12).digest())
    return result


@app.command
def diff(one: Dataset, other: Annotated[str, Parameter(name="OTHER")], /, *, most: int = 10, output: Output = Output()) -> int:
    """Compare two datasets: documents that came, went, moved to another split, or changed. 1 if they differ."""
    folders = _folder(one, output.folder), _folder(other, output.folder)
    same = _same(folders)
    a, b = (_hashes(folder, same) for folder in folders)
    both, alike = a.keys() & b.keys(), sum(same.values())
    groups = {
        "only in the first": sorted(a.keys() - b.keys()),
        "only in the second": sorted(b.keys() - a.keys()),
        "another text": sorted(id for id in both if a[id][1] != b[id][1]),
        "another split": sorted(id for id in both if a[id][0] != b[id][0]),
    }
    if output.json:
        print_json({"documents": [len(a) + alike, len(b) + alike], **groups})
        return int(any(groups.values()))
    verdict = "" if any(groups.values()) else ", no difference"
    stdout().print(f"{len(a) + alike:,} and {len(b) + alike:,} documents, {len(both) + alike:,} in both{verdict}")
    for what, ids in groups.items():
        if ids:
            rest = f" and {len(ids) - most:,} more" if len(ids) > most else ""
            stdout().print(f"[bold]{what}[/]: {len(ids):,}: {', '.join(ids[:most])}{rest}", soft_wrap=True)
    return int(any(groups.values()))
