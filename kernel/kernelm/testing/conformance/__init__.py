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
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kernelm.testing.conformance import calls, chaos, jobs, life
from kernelm.testing.conformance.check import Case, Check, Checks, run
from kernelm.testing.conformance.results import Failed, Report, Result, Skipped, as_json, as_junit, render, show
from kernelm.testing.conformance.stand import Stand
from kernelm.testing.conformance.subject import Subject, read
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
    return [*samples, *calls.checks.all, *jobs.checks.all, *own, *(chaos.checks.all if with_chaos else ()), *watched, *last]


async def check_on(stand: Stand, subject: Subject, with_chaos: bool = False,
                   told: Callable[[Result], None] = lambda _: None) -> Report:  # fmt: skip
    """Check a plugin on a stand that is there."""
    return await run(Case(stand, subject), checks_for(subject, with_chaos), roles(subject), told=told)


async def check_plugin(path: Path, with_chaos: bool = False, command: tuple[str, ...] = (),
                       told: Callable[[Result], None] = lambda _: None) -> Report:  # fmt: skip
    """Check the plugin in a folder on a stand of its own; ClientFault if the folder holds none."""
    subject = read(path, command)
    async with Stand() as stand:
        return await check_on(stand, subject, with_chaos, told)


__all__ = ["Case", "Check", "Checks", "Failed", "Report", "Result", "Skipped", "Stand", "Subject", "as_json", "as_junit",
           "check_on", "check_plugin", "checks_for", "read", "render", "roles", "run", "show"]  # fmt: skip
