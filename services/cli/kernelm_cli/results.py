"""What people want to know of a result: one line for a finished stage, tables for the end of a run."""

from collections.abc import Callable
from typing import Any, TypeVar

import msgspec
from rich.table import Table
from rich.text import Text

from kernelm_contracts.data import Prepared
from kernelm_contracts.jobs import DEPLOY, Deployed, JobRecord, RunView
from kernelm_contracts.optimizer import Optimized, Row
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
    return f"accuracy {scores.accuracy:.4f} on {scores.split}{rate}"


def _optimized(result: Optimized) -> str:
    measured = sum(row.measurement is not None for row in result.rows)
    test = f", accuracy {result.test.accuracy:.4f} on {result.test.split}" if result.test else ""
    return f"{result.winner} of {measured} measured{test}"


def _deployed(result: Deployed) -> str:
    return f"{result.model} generation {result.generation}, artifact {short(result.artifact)}"


def _measured(result: Measured) -> str:
    return ", ".join(f"{m.latency_ms:.1f} ms, {m.throughput:,.0f} docs/s" for m in result.measurements[:3])


LINES: dict[str, tuple[Any, Callable[[Any], str]]] = {
    "data/1.prepare": (Prepared, _prepared), "trainer/1.train": (Trained, _trained), "server/1.measure": (Measured, _measured),
    "optimizer/1.optimize": (Optimized, _optimized), DEPLOY: (Deployed, _deployed),
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
    return ([_quality(scores)] if scores else []) + comparisons


def _converted(job: JobRecord, uses: str, kind: type[T]) -> T | None:
    try:
        return msgspec.convert(job.result, kind) if job.spec.uses == uses else None
    except msgspec.ValidationError:
        return None


def _quality(scores: list[tuple[str, Scores]]) -> Table:
    table = Table(title="Quality", title_justify="left", title_style="bold")
    table.add_column("model")
    table.add_column("split")
    for name in ("documents", "accuracy", "macro recall", "macro F1"):
        table.add_column(name, justify="right")
    for name, s in scores:
        table.add_row(name, s.split, f"{s.documents:,}", f"{s.accuracy:.4f}", f"{s.macro_recall:.4f}", f"{s.macro_f1:.4f}")
    return table


def _comparison(result: Optimized) -> Table:
    table = Table(title=f"Candidates ({result.took_s:.0f} s)", title_justify="left", title_style="bold")
    for name in ("candidate", "outcome", "structure", "algorithm", "precision"):
        table.add_column(name)
    for name in ("accuracy", "size MB", "ms/doc", "p99 ms", "docs/s", "memory MB"):
        table.add_column(name, justify="right")
    for row in result.rows:
        table.add_row(row.name, Text(row.outcome, OUTCOMES.get(row.outcome, "dim")), row.structure, row.algorithm, row.precision,
                      *_figures(row))  # fmt: skip
    return table


def _figures(row: Row) -> list[str]:
    m = row.measurement
    if m is None:
        return ["-"] * 6
    return [f"{m.scores.accuracy:.4f}", f"{m.bytes / 2**20:.1f}", f"{m.latency_ms:.2f}", f"{m.latency_p99_ms:.2f}",
            f"{m.throughput:,.0f}", f"{m.memory_mb:,.0f}"]  # fmt: skip
