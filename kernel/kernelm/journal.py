"""The durable event log and its audit, and the hash-chained record of what was done to the system.

JetStream does not notice a flipped bit in its files: a consumer silently reads less. So every event carries its digest
and its number within its source's life; `audit` reads them all back and its verdict is part of the system's health.
"""

import hashlib

import msgspec

from kernelm_sdk.bus import Bus
from kernelm_sdk.events import received

BUCKETS = ("registry", "routes", "jobs", "runs", "results", "models", "datasets", "deployments", "keys", "usage")
GIB = 2**30


class Entry(msgspec.Struct, frozen=True):
    """One line of the audit trail. `before` is the hash of the line before: none can be changed or removed unseen."""

    at: float  # Unix seconds
    who: str
    what: str
    on: str
    before: str

    def hash(self) -> str:
        return hashlib.sha256(msgspec.json.encode(self)).hexdigest()


class Verdict(msgspec.Struct, frozen=True):
    events: int
    damaged: tuple[int, ...]  # sequences in the stream whose body does not match its digest
    missing: dict[str, int]  # "source.boot" -> events that were numbered and are not there

    @property
    def text(self) -> str:
        if not self.damaged and not self.missing:
            return "intact"
        return f"{len(self.damaged)} damaged ({', '.join(map(str, self.damaged[:5]))}), {sum(self.missing.values())} missing"


async def create_assets(bus: Bus) -> None:
    """The streams and buckets of the system. Only the kernel creates any."""
    await bus.ensure_stream("EVT", ["evt.>"], max_bytes=GIB, duplicate_window=600 * 10**9)
    await bus.ensure_stream("DLQ", ["dlq.>"], max_bytes=GIB // 4)
    await bus.ensure_stream("AUDIT", ["audit.>"], max_bytes=GIB // 4, deny_delete=True, deny_purge=True)
    await bus.ensure_stream("TELEMETRY", ["tel.>"], storage="memory", max_bytes=GIB // 32)
    bucket = {"max_msgs_per_subject": 1, "allow_rollup_hdrs": True, "allow_msg_ttl": True, "deny_delete": True, "discard": "new"}
    for name in BUCKETS:
        await bus.ensure_stream(f"KV_{name}", [f"$KV.{name}.>"], max_bytes=GIB, **bucket, allow_atomic=True)
    await bus.ensure_stream("KV_leases", ["$KV.leases.>"], max_bytes=GIB // 64, **bucket, persist_mode="async")


async def audit(bus: Bus) -> Verdict:
    """Read the whole event log back. Sources count from 1; what the stream's limits removed from the front is no loss."""
    damaged: list[int] = []
    seen: dict[str, list[int]] = {}
    count = first = 0
    async for sequence, subject, body, headers in bus.read("EVT"):
        event = received(subject, body, headers, sequence)
        count, first = count + 1, first or sequence
        if not event.intact:
            damaged.append(sequence)
        if event.source_sequence:
            seen.setdefault(f"{event.source}.{event.boot}", []).append(event.source_sequence)
    limited = first > 1  # else nothing has left the front, and each source has to begin with 1
    missing = {k: gap for k, numbers in seen.items()
               if (gap := max(numbers) - (min(numbers) - 1 if limited else 0) - len(set(numbers)))}  # fmt: skip
    return Verdict(count, tuple(damaged), missing)


class AuditTrail:
    """Appends entries to the stream AUDIT; one writer, the kernel."""

    def __init__(self, bus: Bus) -> None:
        self._bus, self._last = bus, ""

    async def recover(self) -> str:
        """Follow the chain to its end; "intact", or which link is broken."""
        before, verdict = "", "intact"
        async for sequence, _, body, _ in self._bus.read("AUDIT"):
            entry = msgspec.json.decode(body, type=Entry)
            if entry.before != before:
                verdict = f"broken at {sequence}"
            before = entry.hash()
        self._last = before
        return verdict

    async def append(self, at: float, who: str, what: str, on: str) -> None:
        entry = Entry(at, who, what, on, self._last)
        await self._bus.append("audit.kernel", msgspec.json.encode(entry), patience_s=10)
        self._last = entry.hash()
