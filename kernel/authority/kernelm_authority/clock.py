"""What time it is for whoever signs JWTs: the broker's time, since it is the broker that ends them.

A kernel whose clock is off would else issue tokens that have expired before they are used, refuse those that others have made,
and take for ended what still opens. So it asks the broker once a second, and counts from there by its monotonic clock.
"""

import time
from datetime import datetime

import msgspec

from kernelm_sdk.bus import Bus

PING = "$SYS.REQ.SERVER.PING"  # of the system account; the answer has the server's time


class _Server(msgspec.Struct):
    time: datetime


class _Answer(msgspec.Struct):
    server: _Server


class Clock:
    """Unix seconds when called: by this machine's clock until `ask` has been answered, by the broker's from then on."""

    def __init__(self) -> None:
        self._ahead: float | None = None  # the broker's time less our monotonic one

    def __call__(self) -> float:
        return time.time() if self._ahead is None else time.monotonic() + self._ahead

    async def ask(self, system: Bus) -> None:
        """Follow the broker, over a connection of the system account. Never ahead of it: the way of the answer counts as past."""
        answer = msgspec.json.decode((await system.request(PING, b"", 5.0)).data, type=_Answer)
        self._ahead = answer.server.time.timestamp() - time.monotonic()
