"""The accounts of the tenants, on record: what members report of calls, and what jobs and deployments hold.

One record a day holds all of it, with the number of each member's last report and the moment up to which holdings are counted,
so that a report that comes twice counts once, and a service that was away goes on where it stopped.
"""

import asyncio
import logging
import time

from kernelm_contracts.usage import BudgetState, UsageQuery, UsageReport
from kernelm_jobs.accounts import Day, day_of, judge, report, with_calls, with_holdings
from kernelm_jobs.cluster import Cluster
from kernelm_jobs.holdings import holdings
from kernelm_jobs.records import Records
from kernelm_jobs.settings import Settings
from kernelm_jobs.states import HOLDING
from kernelm_jobs.table import Table
from kernelm_sdk.bus import Bus
from kernelm_sdk.errors import ClientFault, Fault
from kernelm_sdk.system import Empty, Kernel, KeyList, Used, UsedRow

DOOR = "gateway"  # the service that calls for others, and says for which tenant
SYSTEM = "system"  # on whose account is what members and administrators call
log = logging.getLogger("kernelm.jobs")


class Accounts:
    """Of all tenants."""

    def __init__(self, bus: Bus, table: Table, cluster: Cluster, settings: Settings) -> None:
        self._bus, self._table, self._cluster, self._settings = bus, table, cluster, settings
        self._days: Records[Day] = Records(bus.bucket("usage", Day), "day")
        self._tenants: dict[str, str] = {}  # caller -> tenant

    async def load(self) -> None:
        """Read what is on record."""
        await self._days.load()

    async def run(self) -> None:
        """Count for ever what is held."""
        while True:
            await asyncio.sleep(self._settings.usage_every_s)
            try:
                await self.count()
            except Fault as fault:  # the kernel or the broker is away: the next one counts for this time too
                log.warning("holdings are counted later: %s", fault.message)

    async def count(self) -> None:
        """Add what was held since the last count."""
        system = await self._cluster.system()
        deployments = {d.name: d for d in self._table.deployments.values()}
        held = holdings(self._table.jobs.in_states(*HOLDING), deployments, system)
        now = time.time()
        await self._days.update(await self._today(now), lambda day: with_holdings(day, held, now))

    async def used(self, report: Used, teller: str) -> None:
        """Put a member's report of calls on record."""
        rows = [row for row in report.rows if row.tenant or row.caller.partition("-")[0] != DOOR]  # the door reports its own
        told = Used(report.life, report.number, tuple(rows))
        tenants = [await self._tenant(row, teller) for row in rows]
        await self._days.update(await self._today(time.time()), lambda day: with_calls(day, told, tenants))

    def report(self, query: UsageQuery) -> UsageReport:
        """The accounts that are asked for."""
        return report(self._days.items(), query, self._settings.budgets, time.time())

    def require(self, tenant: str) -> None:
        """ClientFault "budget_spent" if a budget of processor or accelerator time is used up."""
        for budget in self._settings.budgets:
            if budget.tenant == tenant:
                refuse(judge(self._days.items(), budget, time.time()), ("cpu_s", "gpu_s"))

    async def _today(self, now: float) -> str:
        """The name of today's record, which is there when this returns."""
        name = day_of(now)
        if self._days.get(name) is None:
            days = self._days.items()
            before = days[max(days)] if days else Day(now)
            await self._days.create(name, Day(before.at, {}, before.seen))
        return name

    async def _tenant(self, row: UsedRow, teller: str) -> str:
        if row.tenant:
            return row.tenant if teller.partition("-")[0] == DOOR else SYSTEM
        if not row.caller.startswith("key-"):
            return SYSTEM
        if row.caller not in self._tenants:  # a key that was made since the last look, or none of ours
            known: KeyList = await self._bus.call(Kernel.list_keys, Empty(), timeout_s=5.0)
            self._tenants = {f"key-{k.id}": k.tenant for k in known.keys}
        return self._tenants.get(row.caller, SYSTEM)


def refuse(state: BudgetState, limits: tuple[str, ...]) -> None:
    """ClientFault "budget_spent" if one of `limits` is reached."""
    if reached := [name for name in state.spent if name in limits]:
        left_s = max(round(state.ends - time.time()), 1)
        raise ClientFault("budget_spent", f"tenant {state.budget.tenant!r} has used its budget of {reached[0]} for this "
                          f"{state.budget.period}", "wait for the next one, or have it raised in jobs.toml", retriable=True,
                          retry_after_s=left_s)  # fmt: skip
