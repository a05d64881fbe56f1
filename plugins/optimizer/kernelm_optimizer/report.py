"""The report of a search: a table, the figures behind it, and a picture."""

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from msgspec import Struct

from kernelm_contracts.optimizer import Row
from kernelm_contracts.server import Measurement
from kernelm_contracts.trainer import Scores
from kernelm_optimizer.picture import draw
from kernelm_optimizer.trial_picture import draw_trials

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kernelm_optimizer.study import Trial


class Findings(Struct, frozen=True):
    """All that a search found out; `report.json` is this struct."""

    name: str
    dataset: str  # digest
    winner: str
    model: str  # digest of the winner
    objective: str
    max_drop: float
    budget_s: float
    took_s: float
    rows: tuple[Row, ...]
    test: Scores | None
    int8_reference: Measurement | None = None  # the winner before quantization, in the int8 variant's own interleaved run
    int8: Measurement | None = None
    conditions: dict[str, str] = {}  # of the measurements: processor, cores, library versions
    objectives: tuple[str, ...] = ()  # of the trials, where there was a search
    verdict: str = ""  # of the winner beside the defaults
    notes: tuple[str, ...] = ()  # what was left out, and why
    front: tuple[str, ...] = ()  # rows that no other beats in all of these


def write(findings: Findings, folder: Path, trials: "Sequence[Trial]" = ()) -> None:
    """`report.md`, `report.json` and `report.png` in the new folder `folder`; of `trials` also `trials.json` and `trials.png`."""
    folder.mkdir(parents=True)
    if trials:
        (folder / "trials.json").write_bytes(msgspec.json.format(msgspec.json.encode(trials), indent=1))
        draw_trials(trials, findings.objectives, folder / "trials.png")
    (folder / "report.json").write_bytes(msgspec.json.format(msgspec.json.encode(findings), indent=2))
    draw(findings.rows, findings.winner, findings.max_drop, folder / "report.png")
    (folder / "report.md").write_text(markdown(findings, trials))


def markdown(findings: Findings, trials: "Sequence[Trial]" = ()) -> str:
    """The report for people, in GitHub's Markdown."""
    parts = [f"# Search {findings.name}", _verdict(findings), _table(findings.rows),
             "Accuracy and macro F1 are those of the validation split. Latency is that of one document (median; p99 in "
             "brackets), throughput that of the whole split in batches, memory what loading adds to the process"
             + (", energy that of all processors for a document in batches." if _has_energy(findings.rows) else "."),
             "![Accuracy against latency](report.png)"]
    if trials:
        parts.append(_search(findings, trials))
    if findings.int8_reference and findings.int8:
        parts.append(_side_by_side(findings.int8_reference, findings.int8))
    if findings.conditions:
        parts += ["## Conditions", _grid(("what", "value"), "ll", sorted(findings.conditions.items()))]
    return "\n\n".join(parts) + "\n"


def _verdict(findings: Findings) -> str:
    best = next(row.measurement for row in findings.rows if row.name == findings.winner)
    assert best is not None
    lines = [f"**{findings.winner}** wins by {findings.objective}: accuracy {_percent(best.scores.accuracy)} on the "
             f"validation split ({best.scores.documents} documents), {best.latency_ms:.2f} ms a document, {_mb(best.bytes)} MB."]
    if findings.test:
        lines.append(f"On the test split, looked at once after the choice ({findings.test.documents} documents): accuracy "
                     f"{_percent(findings.test.accuracy)}, macro recall {_percent(findings.test.macro_recall)}, macro F1 "
                     f"{_percent(findings.test.macro_f1)}.")
    if findings.verdict:
        lines.append(f"It is {findings.verdict}.")
    lines += [f"Note: {' '.join(note.split())}." for note in findings.notes]
    lines.append(f"The search took {findings.took_s:.0f} s; training had a budget of {findings.budget_s:.0f} s.")
    return "\n".join(lines)


def _table(rows: "Sequence[Row]") -> str:
    energy = _has_energy(rows)
    header = ("candidate", "structure", "algorithm", "precision", "accuracy", "macro F1", "latency ms", "documents/s",
              "size MB", "memory MB", *(["energy mJ"] * energy), "outcome")  # fmt: skip
    return _grid(header, "llllrrrrrr" + "r" * energy + "l", [_cells(row, energy) for row in rows])


def _has_energy(rows: "Sequence[Row]") -> bool:
    """Whether the machine that measured counts it."""
    return any(row.measurement and row.measurement.energy_j for row in rows)


def _cells(row: Row, energy: bool) -> tuple[str, ...]:
    name = f"**{row.name}**" if row.outcome == "winner" else row.name
    what = (name, row.structure, row.algorithm, row.precision)
    if row.measurement is None:
        return (*what, *[""] * (6 + energy), row.outcome)
    m = row.measurement
    return (*what, _percent(m.scores.accuracy), _percent(m.scores.macro_f1), f"{m.latency_ms:.2f} ({m.latency_p99_ms:.2f})",
            f"{m.throughput:.0f}", _mb(m.bytes), f"{m.memory_mb:.0f}", *([_mj(m.energy_j)] * energy), row.outcome)


def _search(findings: Findings, trials: "Sequence[Trial]") -> str:
    count = Counter(trial.state for trial in trials)
    states = ", ".join(f"{n} {state}" for state, n in count.items())
    lines = [f"## The search\n\n{len(trials)} trials by {' and '.join(findings.objectives)}: {states}. Each is in `trials.json`."]
    if len(findings.objectives) > 1:
        lines.append(f"On the Pareto front of what was measured side by side: {', '.join(findings.front)}.")
    return "\n\n".join([*lines, "![The trials](trials.png)"])


def _side_by_side(before: Measurement, after: Measurement) -> str:
    figures = [
        ("accuracy", _percent(before.scores.accuracy), _percent(after.scores.accuracy),
         f"{100 * (after.scores.accuracy - before.scores.accuracy):+.2f} points"),
        ("latency ms", f"{before.latency_ms:.2f}", f"{after.latency_ms:.2f}", _times(before.latency_ms, after.latency_ms)),
        ("documents/s", f"{before.throughput:.0f}", f"{after.throughput:.0f}", _times(after.throughput, before.throughput)),
        ("size MB", _mb(before.bytes), _mb(after.bytes), _times(before.bytes, after.bytes)),
        ("memory MB", f"{before.memory_mb:.0f}", f"{after.memory_mb:.0f}", _times(before.memory_mb, after.memory_mb)),
    ]
    if after.energy_j:
        figures.append(("energy mJ", _mj(before.energy_j), _mj(after.energy_j), _times(before.energy_j, after.energy_j)))
    return ("## int8 beside the model it was made from\n\nMeasured in turns, in one run of their own.\n\n"
            + _grid(("", "before", "int8", "gain"), "lrrr", figures))


def _grid(header: "Sequence[str]", align: str, rows: "Sequence[Sequence[str]]") -> str:
    rules = ["---:" if a == "r" else "---" for a in align]
    return "\n".join("| " + " | ".join(_cell(c) for c in line) + " |" for line in (header, rules, *rows))


def _cell(text: Any) -> str:
    """Text that can't break out of a table: a reason may come from a stranger's fault."""
    return " ".join(str(text).replace("|", "\\|").split())


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def _mj(joules: float) -> str:
    return f"{1000 * joules:.3g}"


def _mb(size: int) -> str:
    return f"{size / 1e6:.2f}"


def _times(numerator: float, denominator: float) -> str:
    return f"{numerator / denominator:.2f}x" if numerator > 0 and denominator > 0 else "-"
