"""`kernelm usage`: who used what, and what is left of the budgets."""

import asyncio
import time
from collections.abc import Iterable

from rich.console import Console
from rich.table import Table
from rich.text import Text

from kernelm_cli.session import Output, connection, print_json, stdout
from kernelm_contracts.jobs import Jobs
from kernelm_contracts.usage import BudgetState, DayUsage, UsageQuery, UsageReport

HOUR_S, GIB_MB = 3600.0, 1024.0


def usage(*, output: Output = Output(), tenant: str = "", since: str = "", until: str = "") -> int:
    """Show what tenants used: calls and tokens of models, and the cores, memory and accelerators that their work held.

    Parameters
    ----------
    tenant
        Only this one.
    since
        First day, e.g. 2026-11-28 (UTC); the first of this month by default.
    until
        Last day; today by default.
    """

    async def work() -> UsageReport:
        async with connection(output.folder) as bus:
            report: UsageReport = await bus.call(Jobs.usage, UsageQuery(tenant, since, until))
            return report

    report = asyncio.run(work())
    if output.json:
        print_json(report)
        return 0
    console = stdout()
    if not report.days:
        console.print("nothing was used" + (f" by {tenant}" if tenant else ""))
    else:
        console.print(_calls(report.days), _held(report.days))
    if report.budgets:
        _budgets(console, report.budgets)
    return 0


def _calls(days: Iterable[DayUsage]) -> Table:
    """Summed up over the days."""
    sums: dict[tuple[str, str], list[int]] = {}
    for day in days:
        for model, calls in day.usage.calls.items():
            row = sums.setdefault((day.tenant, model), [0, 0, 0, 0])
            for k, amount in enumerate((calls.calls, calls.failed, calls.input_tokens, calls.output_tokens)):
                row[k] += amount
    table = _table("tenant", "model", ">calls", ">failed", ">tokens read", ">tokens made")
    for (tenant, model), amounts in sorted(sums.items()):
        table.add_row(tenant, model, *(f"{amount:,}" for amount in amounts))
    return table


def _held(days: Iterable[DayUsage]) -> Table:
    sums: dict[tuple[str, str], list[float]] = {}
    for day in days:
        for kind, held in day.usage.held.items():
            row = sums.setdefault((day.tenant, kind), [0.0, 0.0, 0.0])
            for k, amount in enumerate((held.cpu_s, held.memory_mb_s / GIB_MB, held.gpu_s)):
                row[k] += amount / HOUR_S
    table = _table("tenant", "held by", ">core hours", ">GiB hours", ">accelerator hours")
    for (tenant, kind), amounts in sorted(sums.items()):
        table.add_row(tenant, kind, *(f"{amount:,.2f}" for amount in amounts))
    return table


def _budgets(console: Console, budgets: Iterable[BudgetState]) -> None:
    table = _table("tenant", "budget", ">used", ">of", "until")
    for state in budgets:
        ends = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(state.ends))
        for limit, unit in (("tokens", 1.0), ("cpu_s", HOUR_S), ("gpu_s", HOUR_S)):
            if most := getattr(state.budget, limit):
                name = {"tokens": "tokens", "cpu_s": "core hours", "gpu_s": "accelerator hours"}[limit]
                used = Text(_amount(getattr(state, limit) / unit), "red" if limit in state.spent else "")
                table.add_row(state.budget.tenant, f"{name} a {state.budget.period}", used, _amount(most / unit), ends)
    console.print(table)


def _amount(value: float) -> str:
    return f"{value:,.0f}" if value == int(value) else f"{value:,.2f}"


def _table(*columns: str) -> Table:
    table = Table()
    for name in columns:
        table.add_column(name.removeprefix(">"), justify="right" if name.startswith(">") else "left")
    return table
