"""Quotas, after Kueue: nominal, borrowing and lending limits, cohorts, fair sharing by weights (dominant shares).

A tenant holds at most its hard quota (`ClusterState.quotas`). Beyond `nominal` it borrows from its cohort, up to `borrowing`;
of its nominal quota the cohort may use `lending`, the rest is always its own.
"""

from collections.abc import Iterable, Mapping

from kernelm_contracts.scheduler import Tenant
from kernelm_scheduler.amounts import CPU_TOLERANCE, Amount, amount_of, cores
from kernelm_sdk.system import Resources

INFINITE: Amount = (float("inf"),) * 3
NOTHING: Amount = (0.0, 0.0, 0.0)
UNITS = ("cores", "MiB", "GPUs")


def plus(a: Amount, b: Amount) -> Amount:
    return a[0] + b[0], a[1] + b[1], a[2] + b[2]


def minus(a: Amount, b: Amount) -> Amount:
    return a[0] - b[0], a[1] - b[1], a[2] - b[2]


class Ledger:
    """What every tenant holds while a round goes on, and what it may still take."""

    def __init__(self, quotas: Mapping[str, Resources], tenants: Iterable[Tenant], held: Mapping[str, Amount]) -> None:
        self.quotas = {tenant: amount_of(quota) for tenant, quota in quotas.items()}
        self.tenants = {tenant.name: tenant for tenant in tenants}
        self.held = dict(held)
        self.withheld: dict[str, Amount] = {}  # for older jobs of the tenant
        self._nominal = {t.name: amount_of(t.nominal) if t.nominal else INFINITE for t in self.tenants.values()}
        self._limit = {t.name: self._most(t) for t in self.tenants.values()}
        self._own = {t.name: self._unlent(t) for t in self.tenants.values()}  # what nobody else may use
        self._members: dict[str, list[str]] = {}
        for tenant in self.tenants.values():
            if tenant.cohort:
                self._members.setdefault(tenant.cohort, []).append(tenant.name)
        self._pool = {cohort: self._sum(minus(self._nominal[n], self._own[n]) if self._nominal[n] != INFINITE else INFINITE
                                        for n in names) for cohort, names in self._members.items()}  # fmt: skip
        self._used = {cohort: self._sum(self._from_pool(n, self.held.get(n, NOTHING)) for n in names)
                      for cohort, names in self._members.items()}  # fmt: skip

    @staticmethod
    def _sum(amounts: Iterable[Amount]) -> Amount:
        total = NOTHING
        for amount in amounts:
            total = plus(total, amount)
        return total

    def _most(self, tenant: Tenant) -> Amount:
        nominal = self._nominal[tenant.name]
        if not tenant.cohort:
            return nominal
        return plus(nominal, amount_of(tenant.borrowing)) if tenant.borrowing else INFINITE

    def _unlent(self, tenant: Tenant) -> Amount:
        if tenant.nominal is None or tenant.lending is None:
            return NOTHING
        left = minus(self._nominal[tenant.name], amount_of(tenant.lending))
        return max(left[0], 0.0), max(left[1], 0.0), max(left[2], 0.0)

    def _from_pool(self, tenant: str, held: Amount) -> Amount:
        own = self._own[tenant]
        return max(held[0] - own[0], 0.0), max(held[1] - own[1], 0.0), max(held[2] - own[2], 0.0)

    # ---- questions ----

    def shortage(self, tenant: str, need: Amount) -> str:
        """Why the tenant can't take `need` more, as "needs 2 cores, the quota of tenant acme has 1 left"; "" if it can."""
        held = plus(self.held.get(tenant, NOTHING), self.withheld.get(tenant, NOTHING))
        if (quota := self.quotas.get(tenant)) and (short := _short(need, minus(quota, held), f"the quota of tenant {tenant}")):
            return f"{short} left"
        if (entry := self.tenants.get(tenant)) is None:
            return ""
        what = f"tenant {tenant} with what it may borrow" if entry.cohort else f"the nominal quota of tenant {tenant}"
        if short := _short(need, minus(self._limit[tenant], held), what):
            return f"{short} left"
        if not entry.cohort:
            return ""
        more = minus(self._from_pool(tenant, plus(held, need)), self._from_pool(tenant, held))
        room = minus(self._pool[entry.cohort], self._used[entry.cohort])
        return f"{short} left" if (short := _short(more, room, f"cohort {entry.cohort}")) else ""

    def never(self, tenant: str, need: Amount) -> str:
        """Why the tenant could not take `need` even if nobody held anything; "" if it could."""
        if (quota := self.quotas.get(tenant)) and (short := _short(need, quota, f"the quota of tenant {tenant}")):
            return f"can never run: {short} in all"
        entry = self.tenants.get(tenant)
        if entry and (short := _short(need, self._limit[tenant], f"tenant {tenant} with what it may borrow")):
            return f"can never run: {short} in all"
        if entry and entry.cohort:
            short = _short(self._from_pool(tenant, need), self._pool[entry.cohort], f"cohort {entry.cohort}")
            return f"can never run: {short} in all" if short else ""
        return ""

    def borrows(self, tenant: str, need: Amount = NOTHING) -> bool:
        """Whether the tenant holds more than its nominal quota, with `need` more."""
        nominal = self._nominal.get(tenant, INFINITE)
        held = plus(self.held.get(tenant, NOTHING), need)
        return held[0] > nominal[0] + CPU_TOLERANCE or held[1] > nominal[1] or held[2] > nominal[2]

    def share(self, tenant: str) -> float:
        """The dominant share of what the tenant borrows in what its cohort lends, over its weight: who has less goes first."""
        entry = self.tenants.get(tenant)
        if entry is None or not entry.cohort:
            return 0.0
        over = minus(self.held.get(tenant, NOTHING), self._nominal[tenant])
        pool = self._pool[entry.cohort]
        return max(max(o, 0.0) / p if p > 0 else 0.0 for o, p in zip(over, pool, strict=True)) / max(entry.weight, 1e-9)

    def cohort(self, tenant: str) -> str:
        entry = self.tenants.get(tenant)
        return entry.cohort if entry else ""

    # ---- changes ----

    def take(self, tenant: str, need: Amount) -> None:
        before = self.held.get(tenant, NOTHING)
        self.held[tenant] = after = plus(before, need)
        if cohort := self.cohort(tenant):
            change = minus(self._from_pool(tenant, after), self._from_pool(tenant, before))
            self._used[cohort] = plus(self._used[cohort], change)

    def withhold(self, tenant: str, need: Amount) -> None:
        """Keep for a waiting job what it will need: from its tenant where that is at its own limit, else from its cohort."""
        cohort = self.cohort(tenant)
        held = plus(self.held.get(tenant, NOTHING), need)
        limits = [limit for limit in (self.quotas.get(tenant), self._limit.get(tenant)) if limit]
        if not cohort or any(_short(held, limit, "") for limit in limits):
            self.withheld[tenant] = plus(self.withheld.get(tenant, NOTHING), need)
        else:
            self._used[cohort] = plus(self._used[cohort], need)

    def give(self, tenant: str, need: Amount) -> None:
        self.take(tenant, (-need[0], -need[1], -need[2]))


def _short(need: Amount, room: Amount, whose: str) -> str:
    """As `amounts.shortage`; what isn't asked for is never short."""
    if need[0] > 0 and need[0] > room[0] + CPU_TOLERANCE:
        return f"needs {cores(need[0])}, {whose} has {max(room[0], 0.0):.3g}"
    for n in (1, 2):
        if need[n] > 0 and need[n] > room[n]:
            return f"needs {need[n]:.0f} {UNITS[n]}, {whose} has {max(room[n], 0.0):.0f}"
    return ""
