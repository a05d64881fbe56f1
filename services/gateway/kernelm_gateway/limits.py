"""How much a tenant may ask for in a minute, by requests and by tokens, and whether its budget of tokens is spent.

Limits are of one gateway and in memory; budgets are those of jobs.toml, counted by the job table over all gateways and NATS
clients.
"""

import asyncio
import math
import time
from typing import Any

from limits import RateLimitItem, RateLimitItemPerMinute
from limits.storage import MemoryStorage
from limits.strategies import FixedWindowRateLimiter, MovingWindowRateLimiter, RateLimiter

from kernelm_contracts.jobs import Jobs
from kernelm_contracts.usage import BudgetState, UsageQuery, UsageReport
from kernelm_gateway.policy import Limit
from kernelm_sdk.errors import ClientFault, Fault

OTHERS = "*"
BUDGETS_ALONE = UsageQuery(since="9999-12-31")  # the budgets come with every report; no day is so late
BUDGETS_S = 5.0  # between two looks at the budgets


class Limits:
    """Of all tenants. `bus`: what has `call`."""

    def __init__(self, bus: Any, limits: tuple[Limit, ...]) -> None:
        self._bus = bus
        self._limits = {limit.tenant: limit for limit in limits}
        storage = MemoryStorage()
        self._requests = MovingWindowRateLimiter(storage)
        self._tokens = FixedWindowRateLimiter(storage)  # the one that counts what goes beyond the limit, too
        self._budgets: dict[str, tuple[BudgetState, ...]] = {}

    def admit(self, tenant: str) -> None:
        """Count one call; ClientFault "rate_limited" or "budget_spent", with the seconds to wait."""
        limit = self._limits.get(tenant) or self._limits.get(OTHERS)
        if limit is not None and limit.tokens_per_minute:
            item = RateLimitItemPerMinute(limit.tokens_per_minute, namespace="tokens")
            if not self._tokens.test(item, tenant):
                raise _limited(tenant, "tokens", item, self._tokens)
        if limit is not None and limit.requests_per_minute:
            item = RateLimitItemPerMinute(limit.requests_per_minute, namespace="requests")
            if not self._requests.hit(item, tenant):
                raise _limited(tenant, "requests", item, self._requests)
        for state in self._budgets.get(tenant, ()):
            if "tokens" in state.spent and state.ends > time.time():
                raise ClientFault("budget_spent", f"tenant {tenant!r} has used its {state.budget.tokens:,} tokens of this "
                                  f"{state.budget.period}", "wait for the next one, or have it raised in jobs.toml",
                                  retriable=True, retry_after_s=math.ceil(state.ends - time.time()))  # fmt: skip

    def spend(self, tenant: str, tokens: int) -> None:
        """Count what a call has cost."""
        limit = self._limits.get(tenant) or self._limits.get(OTHERS)
        if tokens and limit is not None and limit.tokens_per_minute:
            item = RateLimitItemPerMinute(limit.tokens_per_minute, namespace="tokens")
            self._tokens.hit(item, tenant, cost=tokens)

    async def watch_budgets(self) -> None:
        """Look at the budgets for ever. While the job table is away, what was seen last holds."""
        while True:
            try:
                report: UsageReport = await self._bus.call(Jobs.usage, BUDGETS_ALONE)
                budgets: dict[str, tuple[BudgetState, ...]] = {}
                for state in report.budgets:
                    budgets[state.budget.tenant] = (*budgets.get(state.budget.tenant, ()), state)
                self._budgets = budgets
            except Fault as fault:
                if not fault.retriable:
                    raise
            await asyncio.sleep(BUDGETS_S)


def _limited(tenant: str, what: str, item: RateLimitItem, limiter: RateLimiter) -> ClientFault:
    wait_s = max(math.ceil(limiter.get_window_stats(item, tenant).reset_time - time.time()), 1)
    return ClientFault("rate_limited", f"tenant {tenant!r} may use {item.amount:,} {what} a minute here, and has",
                       f"try again in {wait_s} s", retriable=True, retry_after_s=wait_s)  # fmt: skip
