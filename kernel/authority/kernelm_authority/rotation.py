"""Replacing the account's signing key while everybody works."""

import asyncio
import time

from kernelm_authority.identity import Authority, read
from kernelm_sdk.bus import Bus
from kernelm_sdk.errors import Fault, KernelFault

PATIENCE_S = 20.0  # the kernel looks at its claims every second
LOOK_S = 0.05


async def rotate(authority: Authority, url: str, drop_others: bool = False) -> str:
    """Sign with a new key from now on; its public part. The broker is told of it before anything is signed with it: the
    kernel finds the key in its home and pushes. Called again after it was interrupted, it goes on with the same key.

    With `drop_others`, for a key that was stolen: the members who were let in by an earlier one are cut off now, and start
    again; else each takes up the new one at its next renewal. KernelFault "not_in_force" if no kernel pushes it in time:
    then nothing has changed."""
    public = authority.signing.prepare()
    system = await Bus.connect(url, authority.credentials("rotation", "system"))
    try:
        await _in_force(system, authority, public)
        authority.signing.use_next(drop_others)
        await _in_force(system, authority, public)
    finally:
        await system.close()
    return public


async def _in_force(system: Bus, authority: Authority, public: str) -> None:
    """Wait until the broker accepts exactly the keys of the home, `public` among them."""
    until = time.monotonic() + PATIENCE_S
    listed: list[str] = []
    while public not in listed or listed != authority.signing.public():
        if time.monotonic() > until:
            raise KernelFault("not_in_force", f"the broker does not know signing key {public} after {PATIENCE_S:g} s",
                              "see that the kernel runs (`kernelm ps`), and say it again", retriable=True)  # fmt: skip
        await asyncio.sleep(LOOK_S)
        try:
            found = await system.request(authority.lookup, b"", 5.0)
        except Fault as fault:
            if not fault.retriable:
                raise
            continue
        listed = read(found.data.decode(), authority.operator)["nats"].get("signing_keys", []) if found.data else []
