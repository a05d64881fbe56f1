"""API keys: `Authorization: Bearer km_<id>_<secret>`, checked against the records in KV bucket `keys`.

`Key.hash` is the SHA-256 (hex) of the part behind the second underscore. That part has 256 random bits, so no slow hash is
needed; comparing takes the same time wherever the difference is. After a rotation the secret before it is accepted until
`Key.previous_until`. Records are cached for a second at most: a revocation bites within it.
"""

import asyncio
import hashlib
import hmac
import secrets
import time
from collections.abc import Callable
from typing import Protocol

from kernelm_sdk.contract import TOKEN, Method
from kernelm_sdk.errors import ClientFault
from kernelm_sdk.system import Key

ABSENT = secrets.token_hex(32)  # compared with when there is no record, so that both take as long; nobody has what hashes to it
MOST_CACHED = 10_000


class Records(Protocol):
    """What is needed of the bucket: `kernelm_sdk.bus.Bucket[Key]`."""

    async def get(self, key: str) -> tuple[Key | None, int]: ...


class KeyRing:
    """Looks keys up and checks them. Concurrent look-ups of one key are a single one."""

    def __init__(self, records: Records, cache_s: float = 1.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._records, self._cache_s, self._clock = records, cache_s, clock
        self._cache: dict[str, tuple[float, Key | None]] = {}  # id -> when it was read, what was there
        self._reading: dict[str, asyncio.Task[Key | None]] = {}

    async def check(self, authorization: str) -> Key:
        """The key behind the value of an `Authorization` header; ClientFault "unauthorized" if it opens nothing."""
        scheme, _, credential = authorization.strip().partition(" ")
        parts = credential.strip().split("_", 2)
        if scheme.lower() != "bearer" or len(parts) != 3 or parts[0] != "km" or not parts[2] or not TOKEN.match(parts[1]):
            raise _unauthorized("no API key was given" if not authorization else "this is no API key of kernelm")
        key = await self._lookup(parts[1])
        given = hashlib.sha256(parts[2].encode()).hexdigest()
        current = hmac.compare_digest(given, key.hash if key else ABSENT)
        before = hmac.compare_digest(given, (key.previous_hash if key else "") or ABSENT)  # both always, so that it takes as long
        if key is None or not (current or before):
            raise _unauthorized("the API key is not known")
        if not current and key.previous_until <= time.time():
            raise _unauthorized(f"this secret of API key {key.id} ({key.name}) was replaced")
        if key.revoked:
            raise _unauthorized(f"API key {key.id} ({key.name}) was revoked")
        if key.expires and key.expires <= time.time():
            raise _unauthorized(f"API key {key.id} ({key.name}) has expired")
        return key

    async def _lookup(self, identifier: str) -> Key | None:
        read_at, key = self._cache.get(identifier, (float("-inf"), None))
        if self._clock() - read_at < self._cache_s:
            return key
        if (task := self._reading.get(identifier)) is None:
            task = self._reading[identifier] = asyncio.create_task(self._read(identifier))
            task.add_done_callback(lambda _: self._reading.pop(identifier, None))
        return await asyncio.shield(task)  # one impatient client must not cancel the look-up of the others

    async def _read(self, identifier: str) -> Key | None:
        asked = self._clock()  # the record may be revoked from the moment it was asked for
        key, _ = await self._records.get(identifier)
        if len(self._cache) >= MOST_CACHED:
            self._cache.clear()
        self._cache[identifier] = (asked, key)
        return key


def _unauthorized(what: str) -> ClientFault:
    return ClientFault("unauthorized", what, "send `Authorization: Bearer km_...`; `kernelm key create` makes a key")


def grant(key: Key, method: Method, model: str = "") -> None:
    """ClientFault "permission_denied" unless `key` may call `method` (on `model`). A key names methods as in
    subjects ("classify", "get-run") or "*", and models by name or "*"; the JWT of a NATS client reads it the same way."""
    if "*" not in key.methods and method.name not in key.methods:
        raise ClientFault("permission_denied", f"API key {key.id} ({key.name}) may not call {method.name!r}, only "
                          f"{', '.join(key.methods) or 'nothing'}", "ask for a key that grants it")  # fmt: skip
    if model and not sees(key, model):
        raise ClientFault("permission_denied", f"API key {key.id} ({key.name}) may not use model {model!r}, only "
                          f"{', '.join(key.models) or 'none'}", "ask for a key that grants it")  # fmt: skip


def sees(key: Key, model: str) -> bool:
    """Whether the key was granted the deployment `model`."""
    return "*" in key.models or model in key.models
