"""The accounts of tenants: sums as pure functions, and a real system whose calls and holdings end up on record once."""

import time
from datetime import UTC, datetime

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernelm_contracts.jobs import JobRecord, JobSpec
from kernelm_contracts.scheduler import Share
from kernelm_contracts.usage import Budget, CallUsage, HeldUsage, UsageQuery
from kernelm_jobs.accounts import Day, day_of, judge, report, with_calls, with_holdings
from kernelm_jobs.holdings import Held
from kernelm_jobs.usage import refuse
from kernelm_sdk.errors import ClientFault
from kernelm_sdk.system import Resources, Used, UsedRow

NOON = datetime(2026, 11, 28, 12, tzinfo=UTC).timestamp()


def held(tenant: str, cpu: float, members: int = 1, model: str = "", gpus: float = 0.0) -> Held:
    spec = JobSpec("j", "trainer/1.train", {}, Resources(cpu, 1000, gpus), tenant=tenant)
    return Held(JobRecord("j", spec, "k"), (Share("n", members),), model)


def test_calls_are_added_and_a_report_that_comes_twice_counts_once() -> None:
    first = Used("a", 1, (UsedRow("news", "key-1", calls=3, failed=1, input_tokens=50, output_tokens=7), UsedRow("chat", calls=1)))
    second = Used("a", 2, (UsedRow("news", "key-1", calls=1, input_tokens=5),))
    day = Day(NOON)
    for told in (first, second, second, first):
        day = with_calls(day, told, ["acme", "initech"][: len(told.rows)])
    assert day.tenants["acme"].calls == {"news": CallUsage(4, 1, 55, 7)}
    assert day.tenants["initech"].calls == {"chat": CallUsage(1)}
    assert with_calls(day, msgspec.structs.replace(second, life="b", number=1), ["acme"]).tenants["acme"].calls["news"].calls == 5


@given(st.lists(st.floats(0.0, 5000.0), min_size=1, max_size=20))
def test_holdings_are_the_same_however_often_they_are_counted(gaps: list[float]) -> None:
    day, now = Day(NOON), NOON
    for gap in gaps:
        now += gap
        day = with_holdings(day, [held("acme", 2.0, 3), held("acme", 0.5, model="news", gpus=1.0)], now)
    account = day.tenants["acme"].held
    assert account["jobs"].cpu_s == pytest.approx(6.0 * (now - NOON))
    assert account["jobs"].memory_mb_s == pytest.approx(3000.0 * (now - NOON))
    assert account["serving"].gpu_s == pytest.approx(now - NOON)
    assert with_holdings(day, [held("acme", 2.0)], now - 10.0).tenants == day.tenants  # a clock that was set back takes nothing


def test_a_budget_counts_its_period_and_names_what_is_spent() -> None:
    def used(tokens: int, cpu_s: float) -> Day:
        told = Used(f"l{tokens}", 1, (UsedRow("news", calls=1, input_tokens=tokens),))
        return with_holdings(with_calls(Day(NOON - cpu_s), told, ["acme"]), [held("acme", 1.0)], NOON)

    days = {"2026-10-31": used(1000, 1000.0), "2026-11-01": used(60, 10.0), "2026-11-28": used(40, 20.0)}
    month = judge(days, Budget("acme", "month", tokens=100, cpu_s=31.0), NOON)
    assert (month.tokens, month.cpu_s, month.spent) == (100, pytest.approx(30.0), ("tokens",))
    assert datetime.fromtimestamp(month.ends, UTC) == datetime(2026, 12, 1, tzinfo=UTC)
    day = judge(days, Budget("acme", "day", tokens=100, cpu_s=20.0), NOON)
    assert (day.tokens, day.spent) == (40, ("cpu_s",))
    assert datetime.fromtimestamp(day.ends, UTC) == datetime(2026, 11, 29, tzinfo=UTC)
    refuse(month, ("cpu_s", "gpu_s"))
    with pytest.raises(ClientFault) as caught:
        refuse(day, ("cpu_s", "gpu_s"))
    assert (caught.value.code, caught.value.http_status, caught.value.retriable) == ("budget_spent", 429, True)
    assert caught.value.details["retry_after_s"] > 0


def test_a_report_is_of_the_days_and_tenant_that_were_asked_for() -> None:
    told = Used("a", 1, (UsedRow("news", calls=1), UsedRow("news", calls=2)))
    days = {name: with_calls(Day(NOON), told, ["acme", "initech"]) for name in ("2026-10-31", "2026-11-01", "2026-11-28")}
    everything = report(days, UsageQuery(), (), NOON).days
    assert [(d.day, d.tenant) for d in everything] == [(d, t) for d in ("2026-11-01", "2026-11-28") for t in ("acme", "initech")]
    mine = report(days, UsageQuery("acme", "2026-10-01", "2026-10-31"), (Budget("acme"), Budget("initech")), NOON)
    assert [(d.day, d.tenant) for d in mine.days] == [("2026-10-31", "acme")]
    assert [b.budget.tenant for b in mine.budgets] == ["acme"]
    with pytest.raises(ClientFault, match="since"):
        report(days, UsageQuery(since="yesterday"), (), NOON)
    assert day_of(NOON) == "2026-11-28"
    assert isinstance(time.time(), float)


def test_nothing_held_before_the_first_count_is_charged() -> None:
    assert with_holdings(Day(), [held("acme", 2.0)], NOON).tenants["acme"].held["jobs"] == HeldUsage()
