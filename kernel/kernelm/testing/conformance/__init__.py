"""The conformance kit: what holds of every good plugin, tried from outside over NATS, in any language.

    report = await check_plugin(Path("my-plugin"))      # one plugin on a stand of its own
    print(report.good, report.failed)

    class TestConformance(ConformanceSuite):             # or as tests: one a check
        PATH = Path(__file__).parents[1]

A contract brings checks of its own in `<package>.conformance.<contract>`: a module with `checks: Checks`, and if it needs
artifacts or settings `async def prepare(case: Case)`.
"""

import importlib
import importlib.util
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kernelm.testing.conformance import calls, chaos, damage, jobs, life
from kernelm.testing.conformance.check import Case, Check, Checks, run
from kernelm.testing.conformance.places import Place, Stage, place_of
from kernelm.testing.conformance.results import Failed, Report, Result, Skipped, as_json, as_junit, render, show
from kernelm.testing.conformance.stand import Stand
from kernelm.testing.conformance.subject import RUNTIMES, Subject, read
from kernelm_sdk.contract import CONTRACTS


def roles(subject: Subject) -> list[Any]:
    """The modules with the checks of its contracts, where these bring any."""
    found = []
    for contract in (CONTRACTS[c] for c in subject.schemas if c in CONTRACTS):
        package = contract.__module__.rpartition(".")[0]
        name = f"{package}.conformance.{contract.name}"
        if package and importlib.util.find_spec(f"{package}.conformance") and importlib.util.find_spec(name):
            found.append(importlib.import_module(name))
    return found


def checks_for(subject: Subject, with_chaos: bool = False) -> list[Check]:
    """All checks that are made of it, in their order: those that end the instance come last."""
    own = [check for role in roles(subject) for check in role.checks.all]
    ending = ("life.drain", "life.stop", "life.sigterm")
    first = [c for c in [*life.checks.all] if c.name not in ending]
    last = [c for c in life.checks.all if c.name in ending]
    samples = [c for c in first if c.name.startswith("samples.")]
    watched = [c for c in first if c not in samples]
    chaotic = [*chaos.checks.all, *damage.checks.all] if with_chaos else []
    return [*samples, *calls.checks.all, *jobs.checks.all, *own, *chaotic, *watched, *last]


async def check_on(stand: Stand, subject: Subject, with_chaos: bool = False, told: Callable[[Result], None] = lambda _: None,
                   place: Place | None = None) -> Report:  # fmt: skip
    """Check a plugin on a stand that is there."""
    return await run(Case(stand, subject, place=place), checks_for(subject, with_chaos), roles(subject), told)


async def check_plugin(path: Path, with_chaos: bool = False, command: tuple[str, ...] = (),
                       told: Callable[[Result], None] = lambda _: None) -> Report:  # fmt: skip
    """Check the plugin in a folder on a stand of its own; ClientFault if the folder holds none."""
    subject = read(path, command)
    async with Stand() as stand:
        return await check_on(stand, subject, with_chaos, told)


async def check_in(runtimes: tuple[str, ...], path: Path, stage: Stage, with_chaos: bool = False, image: str = "",
                   told: Callable[[Report], None] = lambda _: None) -> list[Report]:  # fmt: skip
    """Check the plugin in a folder in each of these runtimes of the node's, one after another on one stand. Where it can't run
    in one, that report has one check, which is skipped and says why."""
    subject, reports = read(path), list[Report]()
    async with Stand() as stand:
        for runtime in runtimes:
            began = time.monotonic()
            try:
                place = await place_of(runtime, subject, stand.system.home, stand.bus(), stage, image)
            except Skipped as why:
                result = Result("runtime.usable", f"runs in the runtime {runtime!r}", "skipped", str(why))
                m = subject.manifest
                reports.append(Report(m.name, m.version, runtime, m.contracts, (result,), time.monotonic() - began))
            else:
                try:
                    reports.append(await check_on(stand, subject, with_chaos, place=place))
                finally:
                    await place.close()
            told(reports[-1])
    return reports


__all__ = ["RUNTIMES", "Case", "Check", "Checks", "Failed", "Report", "Result", "Skipped", "Stand", "Subject", "as_json",
           "as_junit", "check_in", "check_on", "check_plugin", "checks_for", "read", "render", "roles", "run", "show"]  # fmt: skip
