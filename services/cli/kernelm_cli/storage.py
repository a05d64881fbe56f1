"""A broker that can't store any more. nats-server gives a stream up for good at the first write that fails, on a full disk
say, and answers no write to it until it is started again, however much space there is by then. So the launcher does that.

The sign: the kernel answers, and yet its lease, which it writes every second, stays what it was. Its date says nothing: that is
the kernel's clock, which may be off. (nats-server 2.15, `filestore`:
"Critical write error".)
"""

import asyncio
import logging
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from kernelm.registry import Lease
from kernelm_authority.identity import LEASE_S, admin
from kernelm_sdk.bus import Bus
from kernelm_sdk.errors import Fault
from kernelm_sdk.system import Empty, Kernel

LOOK_S = 1.0
LOOKS = 2  # in a row with the same sign, before anything is done
ROOM = 16 * 2**20  # bytes; with less the broker would fail again at once
log = logging.getLogger("kernelm.launcher")


class Write(NamedTuple):
    """A revision, and when it was first seen."""

    revision: int  # -1: none was seen
    at: float  # time.monotonic()


async def watch(url: str, home: Path, restart: Callable[[], None]) -> None:
    """Look for ever; `restart()` the broker when it can't store and has the room to."""
    bus: Bus | None = None
    signs, seen = 0, Write(-1, 0.0)
    try:
        while True:
            await asyncio.sleep(LOOK_S)
            try:
                if bus is None or bus.closed:
                    bus = await Bus.connect(url, admin(home), timeout_s=5.0)
                revision = await _revision(bus)
            except Fault:  # broker or kernel is away: their keepers look after that
                signs, seen = 0, Write(-1, 0.0)
                continue
            if revision != seen.revision:
                seen = Write(revision, time.monotonic())
            silent = time.monotonic() - seen.at
            signs = signs + 1 if silent > LEASE_S else 0
            free = shutil.disk_usage(home).free
            if signs >= LOOKS and free < ROOM:
                log.error("the broker has stored nothing for %.0f s: %s has %d bytes left; free %d or more",
                          silent, home, free, ROOM)  # fmt: skip
            elif signs >= LOOKS:
                log.error("the broker has stored nothing for %.0f s, and has %d bytes for it: it is started again", silent, free)
                signs = 0
                restart()
    finally:
        if bus is not None:  # left open it would reconnect for ever, through the end of the event loop
            await bus.close()


async def _revision(bus: Bus) -> int:
    """That of the kernel's last write of its lease which the broker kept; 0 if it kept none."""
    await bus.call(Kernel.state, Empty(), timeout_s=2.0)
    _, revision = await bus.bucket("leases", Lease).get("kernel")
    return revision
