"""What people want to know of a result: one line for a finished stage, tables for the end of a run."""

from collections.abc import Callable
from typing import Any, TypeVar

import msgspec
from rich.table import Table
from rich.text import Text

from kernelm_cli.tables import columns
from kernelm_contracts.data import Prepared
from kernelm_contracts.deployments import DEPLOY, Deployed
from kernelm_contracts.jobs import JobRecord, RunView
from kernelm_contracts.optimizer import Compressed, Optimized, Row
from kernelm_contracts.retriever import Indexed
from kernelm_contracts.server import Measured
from kernelm_contracts.trainer import Scores, Trained

T = TypeVar("T")
OUTCOMES = {"winner": "bold green", "measured": "default"}


def short(digest: str) -> str:
    """The first 12 digits of a digest, enough to tell two apart."""
    return digest.removeprefix("sha256:")[:12]


def key_result(job: JobRecord) -> str:
    """The one line that a finished job is worth."""
    try:
        if (lines := LINES.get(job.spec.uses)) is not None:
            return lines[1](msgspec.convert(job.result, lines[0]))
    except msgspec.ValidationError:  # a plugin of another version: show what is there
        pass
    scalars = [(k, v) for k, v in job.result.items() if isinstance(v, str | int | float) and v != ""]
    return ", ".join(f"{k} {short(v) if isinstance(v, str) and v.startswith('sha256:') else v}" for k, v in scalars[:4])


def _prepared(result: Prepared) -> str:
    splits = ", ".join(f"{n} {k:,}" for k, n in ((n, s) for s, n in result.splits.items()))
    return f"{result.documents:,} documents in {len(result.labels)} classes ({splits})"


def _trained(result: Trained) -> str:
    scores = result.test or result.validation
    rate = f", {result.tokens_per_s:,.0f} tokens/s" if result.tokens_per_s else ""
    figure = f"perplexity {scores.perplexity:.2f}" if scores.perplexity else f"accuracy {scores.accuracy:.4f}"
    if whole := _entities(scores):
        figure = f"F1 {whole['f1']:.4f} of entities"
    return f"{figure} on {scores.split}{rate}"


def _entities(scores: Scores) -> dict[str, float]:
    """The figures of whole entities, where a model finds such: beside "O", which is no class that people have."""
    return scores.per_label.get("entities", {}) if "O" in scores.per_label else {}


def _optimized(result: Optimized) -> str:
    measured = sum(row.measurement is not None for row in result.rows)
    test = f", accuracy {result.test.accuracy:.4f} on {result.test.split}" if result.test else ""
    return f"{result.winner} of {measured} measured{test}"


def _compressed(result: Compressed) -> str:
    one, other = result.before, result.after
    costs = f"{one.bytes / 1e6:.2f} to {other.bytes / 1e6:.2f} MB, {one.latency_ms:.2f} to {other.latency_ms:.2f} ms"
    return f"{result.method}: {costs}; {result.change.text}"


def _deployed(result: Deployed) -> str:
    return f"{result.model} generation {result.generation}, artifact {short(result.artifact)}"


def _measured(result: Measured) -> str:
    return ", ".join(f"{m.latency_ms:.1f} ms, {m.throughput:,.0f} docs/s" for m in result.measurements[:3])


def _indexed(result: Indexed) -> str:
    return f"{result.passages:,} passages of {result.documents:,} documents, {result.dimensions} dimensions"


LINES: dict[str, tuple[Any, Callable[[Any], str]]] = {
    "data/1.prepare": (Prepared, _prepared), "trainer/1.train": (Trained, _trained), "server/1.measure": (Measured, _measured),
    "optimizer/1.optimize": (Optimized, _optimized), "optimizer/1.compress": (Compressed, _compressed),
    "retriever/1.index": (Indexed, _indexed), DEPLOY: (Deployed, _deployed),
}  # fmt: skip


def tables(view: RunView) -> list[Table]:
    """The tables at the end of a run: quality on the untouched test split, and the optimizer's comparison."""
    scores: list[tuple[str, Scores]] = []
    comparisons: list[Table] = []
    for job in view.jobs:
        if job.state != "done" or job.spec.parent:
            continue
        if (trained := _converted(job, "trainer/1.train", Trained)) and trained.test:
            scores.append((job.spec.name, trained.test))
        if optimized := _converted(job, "optimizer/1.optimize", Optimized):
            comparisons.append(_comparison(optimized))
            if optimized.test:
                scores.append((f"{job.spec.name}: {optimized.winner}", optimized.test))
    return quality(scores) + comparisons


def _converted(job: JobRecord, uses: str, kind: type[T]) -> T | None:
    try:
        return msgspec.convert(job.result, kind) if job.spec.uses == uses else None
    except msgspec.ValidationError:
        return None


def quality(scores: list[tuple[str, Scores]]) -> list[Table]:
    """A table for each kind of models that are among (name, scores): those that write, that find entities, that tell classes.
    Names are left out where none is given."""
    kinds: dict[Callable[[Scores], dict[str, str]], list[tuple[str, Scores]]] = {}
    for row in scores:
        kind = _of_writer if row[1].perplexity else _of_tagger if _entities(row[1]) else _of_classifier
        kinds.setdefault(kind, []).append(row)
    return [_table(kind, rows) for kind, rows in kinds.items()]


def _table(cells: Callable[[Scores], dict[str, str]], rows: list[tuple[str, Scores]]) -> Table:
    named, figures = any(name for name, _ in rows), cells(rows[0][1])
    table = columns(*["model"] * named, "split", *figures, right=figures, title="Quality")
    for name, scores in rows:
        table.add_row(*[name] * named, scores.split, *cells(scores).values())
    return table


def _of_classifier(scores: Scores) -> dict[str, str]:
    return {"documents": f"{scores.documents:,}", "accuracy": f"{scores.accuracy:.4f}",
            "macro recall": f"{scores.macro_recall:.4f}", "macro F1": f"{scores.macro_f1:.4f}"}  # fmt: skip


def _of_tagger(scores: Scores) -> dict[str, str]:
    """Of whole entities, but for the accuracy, which is of words."""
    whole = _entities(scores)
    return {"texts": f"{scores.documents:,}", "entities": f"{whole['support']:,.0f}", "precision": f"{whole['precision']:.4f}",
            "recall": f"{whole['recall']:.4f}", "F1": f"{whole['f1']:.4f}", "words right": f"{scores.accuracy:.4f}"}  # fmt: skip


def _of_writer(scores: Scores) -> dict[str, str]:
    """It has no labels."""
    return {"texts": f"{scores.documents:,}", "tokens": f"{scores.tokens:,}", "next token": f"{scores.accuracy:.4f}",
            "perplexity": f"{scores.perplexity:.2f}"}  # fmt: skip


def _comparison(result: Optimized) -> Table:
    energy = any(row.measurement and row.measurement.energy_j for row in result.rows)  # where the machine counts it
    figures = "accuracy", "size MB", "ms/doc", "p99 ms", "docs/s", "memory MB", *(["mJ/doc"] * energy)
    table = columns("candidate", "outcome", "structure", "algorithm", "precision", *figures, right=figures,
                    title=f"Candidates ({result.took_s:.0f} s)")  # fmt: skip
    for row in result.rows:
        table.add_row(row.name, Text(row.outcome, OUTCOMES.get(row.outcome, "dim")), row.structure, row.algorithm, row.precision,
                      *_figures(row, energy))  # fmt: skip
    return table


def _figures(row: Row, energy: bool) -> list[str]:
    m = row.measurement
    if m is None:
        return ["-"] * (6 + energy)
    return [f"{m.scores.accuracy:.4f}", f"{m.bytes / 2**20:.1f}", f"{m.latency_ms:.2f}", f"{m.latency_p99_ms:.2f}",
            f"{m.throughput:,.0f}", f"{m.memory_mb:,.0f}", *([f"{1000 * m.energy_j:.3g}"] * energy)]  # fmt: skip
