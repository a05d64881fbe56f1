"""Typed records in the broker's key-value store; all writes are compare-and-set."""

from typing import TYPE_CHECKING, Generic, TypeVar

import msgspec

from kernelm_sdk.serving import encode

if TYPE_CHECKING:
    from kernelm_sdk.bus import Bus

T = TypeVar("T", bound=msgspec.Struct)


class Bucket(Generic[T]):
    """Typed records under keys, all writes compare-and-set. Keys are `[a-z0-9.-]+`."""

    def __init__(self, bus: "Bus", name: str, kind: type[T]) -> None:
        self._bus, self._name, self._decoder = bus, name, msgspec.json.Decoder(kind)

    async def get(self, key: str) -> tuple[T | None, int]:
        """The record and its revision; (None, revision to expect for a new one) where there is none."""
        msg = await self._bus.request(f"$JS.API.DIRECT.GET.KV_{self._name}.$KV.{self._name}.{key}", b"", 5.0)
        headers = msg.headers or {}
        if headers.get("Status") == "404":
            return None, 0
        revision = int(headers["Nats-Sequence"])
        return (None, revision) if _deleted(headers) else (self._decoder.decode(msg.data), revision)

    async def put(self, key: str, record: T, revision: int, ttl_s: int = 0, patience_s: float = 0.0) -> int:
        """Write if `revision` is still the last one (0: there must be none; -1: whatever it is); the new revision."""
        headers = {} if revision < 0 else {"Nats-Expected-Last-Subject-Sequence": str(revision)}
        if ttl_s:
            headers["Nats-TTL"] = str(ttl_s)
        return await self._bus.append(f"$KV.{self._name}.{key}", encode(record), headers, patience_s)

    async def delete(self, key: str, revision: int = -1) -> None:
        headers = {"KV-Operation": "DEL"}
        if revision >= 0:
            headers["Nats-Expected-Last-Subject-Sequence"] = str(revision)
        await self._bus.append(f"$KV.{self._name}.{key}", b"", headers)

    async def all(self, prefix: str = "") -> dict[str, tuple[T, int]]:
        """Every record, with its revision, whose key is `prefix` or begins with it and a dot."""
        start = len(f"$KV.{self._name}.")
        pattern = f"$KV.{self._name}." + (f"{prefix}.>" if prefix else ">")
        found: dict[str, tuple[T, int]] = {}
        async for sequence, subject, body, headers in self._bus.read(f"KV_{self._name}", pattern):
            key = subject[start:]
            found.pop(key, None)
            if not _deleted(headers):
                found[key] = (self._decoder.decode(body), sequence)
        return found


def _deleted(headers: dict[str, str]) -> bool:
    return headers.get("KV-Operation") in ("DEL", "PURGE") or "Nats-Marker-Reason" in headers
