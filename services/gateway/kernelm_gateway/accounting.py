"""What every call leaves behind: a place in its tenant's limits, its cost on the tenant's account, figures for Prometheus, a
line in the audit."""

import asyncio
import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from kernelm_gateway.audit import Audit
from kernelm_gateway.limits import Limits
from kernelm_gateway.metrics import Metrics
from kernelm_gateway.policy import Policy
from kernelm_sdk import tracing
from kernelm_sdk.contract import Method
from kernelm_sdk.errors import Fault
from kernelm_sdk.system import Key
from kernelm_sdk.usage import tokens

OK, LEFT, BUG = "ok", "left", "internal"  # outcomes besides the codes of faults


class Entry:
    """One call under way: whoever makes it says what comes."""

    def __init__(self) -> None:
        self.begun = time.perf_counter()
        self.first_s = 0.0  # to the first frame of a stream
        self.last: Any = None  # the reply, or the last frame
        self.trace = ""  # its id, where there is one

    def came(self, frame: Any) -> None:
        """A frame of a stream."""
        self.first_s = self.first_s or time.perf_counter() - self.begun
        self.last = frame


class Ledger:
    """Of one gateway. Without a `home` there is no audit."""

    def __init__(self, bus: Any, policy: Policy, home: Path | None) -> None:
        self._bus = bus
        self.limits = Limits(bus, policy.limits)
        self.metrics = Metrics(bus)
        self.audit = Audit(home, policy.audit if home else msgspec.structs.replace(policy.audit, enabled=False))

    @contextlib.contextmanager
    def entry(self, key: Key, method: Method, model: str, request: msgspec.Struct) -> Iterator[Entry]:
        """Around a call; `model` "" for those of the system. ClientFault "rate_limited" or "budget_spent" before it begins."""
        if model:
            self.limits.admit(key.tenant)
        entry, at, outcome = Entry(), time.time(), OK
        self.metrics.began()
        try:
            with tracing.door(self._bus, method, model):
                entry.trace = tracing.parent()[3:35]  # "00-<trace>-<span>-<flags>"
                yield entry
        except (GeneratorExit, asyncio.CancelledError):  # the caller has what it wanted, or has left
            outcome = LEFT
            raise
        except Fault as fault:
            outcome = fault.code
            raise
        except Exception:
            outcome = BUG
            raise
        finally:
            self._settle(entry, key, method, model, request, at, outcome)

    def _settle(self, entry: Entry, key: Key, method: Method, model: str, request: msgspec.Struct, at: float, outcome: str) -> None:
        cost = tokens(entry.last)
        if model and outcome != "unknown_model":
            self._bus.meter.note(model, entry.last, tenant=key.tenant, failed=outcome not in (OK, LEFT))
            self.limits.spend(key.tenant, sum(cost))
        name = f"{method.contract.id()}.{method.name}"
        self.metrics.ended(name, model, time.perf_counter() - entry.begun, outcome, cost, entry.first_s)
        self.audit.note(key, name, model, at, outcome, cost, entry.trace, request, entry.last)

    def close(self) -> None:
        """Write what waits to be written."""
        self.audit.close()
