"""The dataset's files: Parquet, cards, labels, the list of what was dropped, pictures. Nothing in them tells the time."""

from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from tokenizers import Tokenizer

from kernelm_contracts.data import DatasetCard, PrepareRequest
from kernelm_data import pictures
from kernelm_data.account import Document, Dropped

ROWS = 8192  # in a row group: what a reader must hold to read one document


class Row(msgspec.Struct, frozen=True):
    """A document of the dataset."""

    document: Document
    split: str
    input_ids: npt.NDArray[np.int32] | None = None


class Dataset(msgspec.Struct, frozen=True):
    """All that is written."""

    card: DatasetCard
    request: PrepareRequest
    rows: list[Row]
    dropped: list[Dropped]
    token_lengths: list[int] | None  # before the cut
    tokenizer: Tokenizer | None


def write(dataset: Dataset, out: Path) -> None:
    """Write the files of the dataset into the folder `out`."""
    card = dataset.card
    for split in card.splits:
        rows = [row for row in dataset.rows if row.split == split]
        pq.write_table(table(rows, card.labels), out / f"{split}.parquet", compression="zstd", row_group_size=ROWS)
    (out / "dataset.json").write_bytes(_json(card))
    (out / "labels.json").write_bytes(_json(list(card.labels)))
    (out / "dropped.jsonl").write_bytes(msgspec.json.Encoder().encode_lines(dataset.dropped))
    if dataset.tokenizer is not None:
        dataset.tokenizer.save(str(out / "tokenizer.json"))
    pictures.draw_account(card, out / "account.png")
    pictures.draw_classes(card, out / "classes.png")
    characters = {label: [len(r.document.text) for r in dataset.rows if r.document.label == label] for label in card.labels}
    pictures.draw_lengths(characters, dataset.token_lengths, card.max_tokens, out / "lengths.png")
    (out / "card.md").write_text(markdown(card, dataset.request), "utf-8")


def table(rows: Sequence[Row], labels: Sequence[str]) -> pa.Table:
    """Columns `id`, `text`, `label` (position in `labels`) and, if the rows are tokenized, `input_ids`; sorted by id."""
    rows = sorted(rows, key=lambda row: row.document.id)
    number = {label: i for i, label in enumerate(labels)}
    columns: dict[str, pa.Array] = {
        "id": pa.array([row.document.id for row in rows], pa.string()),
        "text": pa.array([row.document.text for row in rows], pa.string()),
        "label": pa.array([number[row.document.label] for row in rows], pa.int32()),
    }
    if rows and rows[0].input_ids is not None:
        columns["input_ids"] = pa.array([row.input_ids for row in rows], pa.list_(pa.int32()))
    return pa.table(columns)


def _json(value: object) -> bytes:
    return msgspec.json.format(msgspec.json.encode(value), indent=2) + b"\n"


def markdown(card: DatasetCard, request: PrepareRequest) -> str:
    """The card as a person reads it."""
    total = sum(s.documents for s in card.splits.values())
    tokenized = f", tokenized with `{card.tokenizer}`" if card.tokenizer else ""
    source = card.source or "an unnamed source"
    lines = [f"# {_cell(card.name)}", "",
             f"{total:,} documents in {len(card.labels)} classes, from `{source}`{tokenized}.", "",
             "![documents in and out of each step](account.png)", "",
             "| step | in | out | dropped | changed |", "|---|--:|--:|---|---|"]  # fmt: skip
    for step in card.steps:
        counts = f"{step.documents_in:,} | {step.documents_out:,} | {_counts(step.reasons)} | {_counts(step.changed)}"
        lines.append(f"| {step.name} | {counts} |")
    lines += ["", *_private(card)]
    lines += ["", "Each dropped document, with its reason and the one that stands for it, is a line of `dropped.jsonl`.", "",
              "![documents of each class](classes.png)", "",
              "| class | " + " | ".join(card.splits) + " | all |", "|---|" + "--:|" * (len(card.splits) + 1)]  # fmt: skip
    for label in card.labels:
        documents = [s.per_label[label] for s in card.splits.values()]
        lines.append(f"| {_cell(label)} | " + " | ".join(f"{d:,}" for d in documents) + f" | {sum(documents):,} |")
    lines.append("| **documents** | " + " | ".join(f"{s.documents:,}" for s in card.splits.values()) + f" | {total:,} |")
    if card.tokenizer:
        tokens = [s.tokens for s in card.splits.values()]
        lines.append("| **tokens** | " + " | ".join(f"{t:,}" for t in tokens) + f" | {sum(tokens):,} |")
    characters = ", ".join(f"{quantile} {length:,.0f}" for quantile, length in card.characters.items())
    lines += ["", "![lengths](lengths.png)", "", f"Characters: {characters}.",
              "", "## Request", "", "```json", _json(request).decode().rstrip(), "```", ""]  # fmt: skip
    return "\n".join(lines)


def _private(card: DatasetCard) -> list[str]:
    """What a person should know of private data before they train on the dataset or pass it on."""
    private = card.private
    if private is None:
        return ["**Private data:** nobody looked for any."]
    found = _counts(private.found) or "none"
    left = f"**left in the dataset: {_counts(private.left)}**" if private.left else "none of it is left in the dataset"
    return [f"**Private data** ({', '.join(private.types)}; action: {private.action}): {private.affected:,} of "
            f"{private.documents:,} documents held some; found: {found}; {left}. What rules and models miss is still there."]


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{count:,} {_cell(what)}" for what, count in counts.items())


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
