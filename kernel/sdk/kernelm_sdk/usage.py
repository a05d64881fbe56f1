"""Who used what: calls and tokens of models, counted where they are served and told to the job table (`work/1.used`).

Counts are sent every few seconds and before an instance ends; what was sent is sent again under the same number until it is
acknowledged, so that nothing counts twice. A process that is killed loses what it had not yet told.
"""

import asyncio
import logging
import secrets
from typing import Any

from kernelm_sdk.errors import ClientFault, Fault
from kernelm_sdk.system import Used, UsedRow, Work

EVERY_S = 5.0
log = logging.getLogger("kernelm.usage")


class Meter:
    """Counts by (caller, tenant, model). `caller` is whose name the broker has checked; who calls for others names the tenant."""

    def __init__(self) -> None:
        self._rows: dict[tuple[str, str, str], UsedRow] = {}
        self._sent: Used | None = None
        self._life, self._number = secrets.token_hex(8), 0

    def note(self, model: str, reply: Any = None, *, caller: str = "", tenant: str = "", failed: bool | None = None) -> None:
        """One call of `model`; `reply` is what answered it (the last frame of a stream), None where it `failed` and nothing else is
        said."""
        read, made = tokens(reply)
        failed = reply is None if failed is None else failed
        key = (caller, tenant, model)
        row = self._rows.get(key) or UsedRow(model, caller, tenant)
        self._rows[key] = UsedRow(model, caller, tenant, row.calls + 1, row.failed + failed, row.input_tokens + read,
                                  row.output_tokens + made)  # fmt: skip

    async def tell(self, bus: Any, patience_s: float = 0.0) -> None:
        """Tell the job table what is new. What it does not acknowledge is told again the next time."""
        while self._sent is not None or self._rows:
            if self._sent is None:
                self._number += 1
                self._sent, self._rows = Used(self._life, self._number, tuple(self._rows.values())), {}
            await bus.call(Work.used, self._sent, timeout_s=10.0, patience_s=patience_s)
            self._sent = None

    async def run(self, bus: Any) -> None:
        """Tell for ever."""
        while True:
            await asyncio.sleep(EVERY_S)
            try:
                await self.tell(bus)
            except Fault as fault:
                level = logging.ERROR if isinstance(fault, ClientFault) else logging.INFO  # the job table may be away
                log.log(level, "usage is told later: %s", fault.message)


def tokens(reply: Any) -> tuple[int, int]:
    """Tokens that were read and that were made, as far as the answer says."""
    usage = getattr(reply, "usage", None)
    if usage is not None:
        return getattr(usage, "prompt_tokens", 0), getattr(usage, "completion_tokens", 0)
    return getattr(reply, "tokens", 0), 0
