"""Who used what: of each tenant and day, the calls and tokens of models, and the resources that its work held."""

from typing import Literal

from msgspec import Struct


class CallUsage(Struct, frozen=True):
    """Of one model."""

    calls: int = 0  # failed ones included
    failed: int = 0
    input_tokens: int = 0
    output_tokens: int = 0


class HeldUsage(Struct, frozen=True):
    """What was granted, used to the full or not: nobody else could have it."""

    cpu_s: float = 0.0  # core seconds
    memory_mb_s: float = 0.0
    gpu_s: float = 0.0  # accelerator seconds


class TenantUsage(Struct, frozen=True):
    calls: dict[str, CallUsage] = {}  # model -> its calls, over HTTP, gRPC and NATS
    held: dict[str, HeldUsage] = {}  # "jobs" and "serving"


class Budget(Struct, frozen=True, forbid_unknown_fields=True):
    """What a tenant may use in a period; 0 for no limit. Days and months are those of UTC."""

    tenant: str
    period: Literal["day", "month"] = "month"
    tokens: int = 0  # read and made, together
    cpu_s: float = 0.0
    gpu_s: float = 0.0


class BudgetState(Struct, frozen=True):
    budget: Budget
    tokens: int  # used in the present period
    cpu_s: float
    gpu_s: float
    ends: float  # of the period, Unix seconds
    spent: tuple[str, ...] = ()  # the limits that are reached: "tokens", "cpu_s", "gpu_s"


class UsageQuery(Struct, frozen=True):
    tenant: str = ""  # "" for all
    since: str = ""  # day, "2026-11-28", UTC; "" for the first of this month
    until: str = ""  # day, included; "" for today


class DayUsage(Struct, frozen=True):
    day: str
    tenant: str
    usage: TenantUsage


class UsageReport(Struct, frozen=True):
    days: tuple[DayUsage, ...]  # by day and tenant
    budgets: tuple[BudgetState, ...] = ()  # of the tenants that were asked for
