"""Who used what, as pure functions: reports of calls and held resources added to days, days to reports, budgets judged."""

import re
from calendar import monthrange
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime, timedelta

from msgspec import Struct
from msgspec.structs import replace

from kernelm_contracts.usage import Budget, BudgetState, CallUsage, DayUsage, HeldUsage, TenantUsage, UsageQuery, UsageReport
from kernelm_jobs.holdings import Held, size, times
from kernelm_sdk.errors import ClientFault
from kernelm_sdk.system import Used

DAY = re.compile(r"\d{4}-\d{2}-\d{2}")


class Day(Struct, frozen=True):
    """All that was used on one day, as it is on record."""

    at: float = 0.0  # Unix seconds up to which held resources are counted
    tenants: dict[str, TenantUsage] = {}
    seen: dict[str, int] = {}  # life of a member -> number of its last report


def day_of(at: float) -> str:
    """The day, in UTC, of a moment in Unix seconds."""
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d")


def with_calls(day: Day, report: Used, tenants: list[str]) -> Day:
    """The day with a report of calls, whose rows belong to `tenants`; unchanged if the report is on record already."""
    if day.seen.get(report.life, 0) >= report.number:
        return day
    accounts = dict(day.tenants)
    for row, tenant in zip(report.rows, tenants, strict=True):
        account = accounts.get(tenant, TenantUsage())
        old = account.calls.get(row.model, CallUsage())
        new = CallUsage(old.calls + row.calls, old.failed + row.failed, old.input_tokens + row.input_tokens,
                        old.output_tokens + row.output_tokens)  # fmt: skip
        accounts[tenant] = replace(account, calls={**account.calls, row.model: new})
    return replace(day, tenants=accounts, seen={**day.seen, report.life: report.number})


def with_holdings(day: Day, held: Iterable[Held], now: float) -> Day:
    """The day with what was held since it was last counted."""
    seconds = max(now - day.at, 0.0) if day.at else 0.0
    accounts = dict(day.tenants)
    for holding in held:
        account = accounts.get(holding.job.spec.tenant, TenantUsage())
        kind = "serving" if holding.model else "jobs"
        old, has = account.held.get(kind, HeldUsage()), times(holding.job.spec.resources, size(holding.shares))
        new = HeldUsage(old.cpu_s + seconds * has.cpu, old.memory_mb_s + seconds * has.memory_mb, old.gpu_s + seconds * has.gpus)
        accounts[holding.job.spec.tenant] = replace(account, held={**account.held, kind: new})
    return replace(day, at=now, tenants=accounts)


def report(days: Mapping[str, Day], query: UsageQuery, budgets: Iterable[Budget], now: float) -> UsageReport:
    """What `query` asks for. ClientFault "invalid" for what is no day."""
    first, last = query.since or day_of(now)[:8] + "01", query.until or day_of(now)
    for field, text in (("since", first), ("until", last)):
        if not DAY.fullmatch(text):
            raise ClientFault("invalid", f"`{field}` is {text!r}, and no day", "write it as 2026-11-28")
    found = [DayUsage(day, tenant, usage) for day in sorted(days) if first <= day <= last
             for tenant, usage in sorted(days[day].tenants.items()) if query.tenant in ("", tenant)]  # fmt: skip
    states = [judge(days, budget, now) for budget in budgets if query.tenant in ("", budget.tenant)]
    return UsageReport(tuple(found), tuple(states))


def judge(days: Mapping[str, Day], budget: Budget, now: float) -> BudgetState:
    """How much of a budget is used in the period of `now`."""
    today = datetime.fromtimestamp(now, UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    monthly = budget.period == "month"
    prefix = today.strftime("%Y-%m" if monthly else "%Y-%m-%d")
    left = monthrange(today.year, today.month)[1] - today.day + 1 if monthly else 1
    accounts = [d.tenants[budget.tenant] for name, d in days.items() if name.startswith(prefix) and budget.tenant in d.tenants]
    calls = [c for a in accounts for c in a.calls.values()]
    held = [h for a in accounts for h in a.held.values()]
    used = {"tokens": sum(c.input_tokens + c.output_tokens for c in calls), "cpu_s": sum(h.cpu_s for h in held),
            "gpu_s": sum(h.gpu_s for h in held)}  # fmt: skip
    spent = tuple(name for name, amount in used.items() if 0 < getattr(budget, name) <= amount)
    return BudgetState(budget, int(used["tokens"]), used["cpu_s"], used["gpu_s"], (today + timedelta(days=left)).timestamp(), spent)
