"""`kernelm simulate`: a trace of jobs through scheduler plugins, beside each other. Nothing has to run for that."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from math import inf
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from cyclopts import Parameter
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from kernelm_cli.session import print_json, stdout
from kernelm_sdk.errors import ClientFault
from kernelm_simulator import bound, cluster, engine, metrics, picture, schedulers, synthetic, trace
from kernelm_simulator.profiles import Profiles

HOUR, DAY = 3600.0, 86400.0
SYNTHETIC = ("poisson", "diurnal")
HEADINGS = ("average", "median", "p99", "makespan", "worst rho", "rho > 1", "in use", "restarting", "restarts", "decide ms", "p99")


def simulate(*, trace: Annotated[str, Parameter(name="--trace")], scheduler: str = "scheduler",
             cluster: Annotated[str, Parameter(name="--cluster")] = cluster.SIA,
             data: Annotated[Path | None, Parameter(env_var="KERNELM_SIA_DATA")] = None, jobs: int = 0, seed: int = 0,
             from_day: float = 0.0, days: float = inf, sizes: Literal["auto", "elastic", "rigid"] = "auto",
             round_s: float = engine.ROUND_S, refresh_s: float = engine.ROUND_S, blind: bool = False, settings: Path | None = None,
             json: Annotated[bool, Parameter(negative="")] = False, picture: Path | None = None,
             by: Literal["job", "tenant", "type"] = "job") -> int:  # fmt: skip
    """Replay a trace of jobs through scheduler plugins, and compare them.

    Parameters
    ----------
    trace
        A CSV file in a public format (Sia and Pollux workloads, Philly, Helios, Acme, Alibaba PAI), or `poisson` or `diurnal`.
    scheduler
        Installed scheduler plugins or MODULE:CLASS, separated by commas.
    cluster
        NODESxDEVICES:TYPE, separated by commas.
    data
        Folder that holds `profiles/`, for traces that name applications.
    jobs
        Only so many jobs of the trace; of a synthetic one 160 if not given.
    from_day
        Only the jobs of the trace that were submitted so many days after its first one, or later.
    days
        And for so many days.
    sizes
        Whether jobs are given as elastic or with the number of devices their owners asked for; auto: elastic for the
        schedulers that resize jobs.
    round_s
        Rounds are held at multiples of that; the job table, which asks whenever something happens, is more like 5.
    refresh_s
        A round is held at least so often while jobs wait or could be resized.
    blind
        The schedulers are not told how much work a job has left.
    settings
        A TOML file with a table of settings for each scheduler.
    picture
        A PNG or SVG: devices over time, and the distributions.
    by
        What the bands of the picture are coloured by.
    """
    machines = _cluster(cluster)
    work = _jobs(trace, data, jobs, seed, (from_day * DAY, days * DAY))
    tables = _settings(settings)
    loaded = [schedulers.load(name.strip(), tables.get(name.strip())) for name in scheduler.split(",")]
    results = []
    with Progress(transient=True, console=Console(stderr=True), disable=json) as progress, quiet():
        for one in progress.track(loaded, description="simulating"):
            rigid = sizes == "rigid" or (sizes == "auto" and not one.resizes)
            options = engine.Options(round_s, refresh_s, rigid, not blind)
            results.append((one.name, engine.Simulation(work, machines, one.decide, options, one.steady).run()))
    summaries = [metrics.summarize(name, result, machines) for name, result in results]
    least = bound.least_average(work, machines, round_s)
    if json:
        print_json({"trace": trace, "jobs": len(work), "cluster": cluster, "bound": least, "schedulers": summaries})
    else:
        stdout().print(table(summaries, least, f"{Path(trace).name}: {len(work)} jobs on {machines.devices} devices"))
    if picture is not None:
        _draw(picture, results, machines, by)
    return 0


def table(summaries: list[metrics.Summary], least: float, title: str) -> Table:
    """A line for each scheduler, and one for the bound."""
    caption = "hours; rho: time over time alone on an equal share; restarts a job"
    drawn = Table(title=title, title_justify="left", caption=caption, caption_justify="left")
    drawn.add_column("scheduler")
    for heading in HEADINGS:
        drawn.add_column(heading, justify="right")
    best = min(s.average for s in summaries)
    for s in summaries:
        hours = (f"{x / HOUR:.3f}" for x in (s.average, s.median, s.p99, s.makespan))
        shares = (f"{x:.0%}" for x in (s.rho_unfair, s.utilization, s.restarting))
        name = s.scheduler + (f" ({s.rejected} rejected)" if s.rejected else "")
        rest = (f"{s.restarts:.2f}", f"{s.decide_ms:.1f}", f"{s.decide_p99_ms:.1f}")
        drawn.add_row(name, *hours, f"{s.rho_worst:.2f}", *shares, *rest, style="bold" if s.average == best else "")
    drawn.add_row("no scheduler below", f"{least / HOUR:.3f}", style="dim")
    return drawn


@contextmanager
def quiet() -> Iterator[None]:
    """What libraries in C write to the standard output (HiGHS names a function of its own now and then, and knows no option against
    it) is thrown away."""
    sys.stdout.flush()
    saved, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        yield
    finally:
        os.dup2(saved, 1)
        os.close(saved)
        os.close(nowhere)


_cluster = cluster.parse
_draw = picture.draw


def _jobs(name: str, data: Path | None, jobs: int, seed: int, window: tuple[float, float]) -> list[trace.TraceJob]:
    if name in SYNTHETIC:
        return synthetic.generate(name, jobs or 160, seed)
    if not (window[0] >= 0 and window[1] > 0):
        said = f"{window[1] / DAY:g} days from day {window[0] / DAY:g} on"
        raise ClientFault("invalid", f"no job can be of {said}", "--days above 0, --from-day not below 0")
    return trace.read(Path(name), Profiles(data / "profiles") if data else None, jobs, from_s=window[0], for_s=window[1])


def _settings(path: Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        return msgspec.toml.decode(path.read_bytes(), type=dict[str, dict[str, Any]])
    except (OSError, msgspec.MsgspecError) as error:
        raise ClientFault("invalid_settings", f"{path}: {error}", "TOML with a table for each scheduler") from None
