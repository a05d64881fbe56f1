"""`python -m kernelm_sdk.machine MODULE`: a member of a further machine, which comes back by itself.

Before it runs `python -m MODULE` it lays down what that joins with: nobody on this machine can make a token, so the member keeps
a key of its own, made here by its first start with the one-time token that came with the machine. All that this key can do is
enroll as this member, until an administrator forgets the machine.

    KERNELM_TOKEN_FILE    a one-time token, where one was brought here; it is deleted once it is spent
    beside it, `key`      the member's own key (mode 0600), from its first start on
    beside it, `ticket`   what MODULE joins with, and takes; its KERNELM_TOKEN_FILE

Environment: KERNELM_URL, KERNELM_TOKEN_FILE.
"""

import asyncio
import logging
import os
import secrets
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import NoReturn, TypeVar

import msgspec
import uvloop

from kernelm_sdk import logs
from kernelm_sdk.bus import Bus, Credentials
from kernelm_sdk.enrollment import enroll, new_seed, ticket_of, token_of
from kernelm_sdk.errors import ClientFault, Fault, KernelFault

T = TypeVar("T")
LONGEST_PAUSE_S = 30.0  # between two tries to reach the first machine, which may be away for days
REMEDY = "`kernelm deploy machine` on the first machine makes tokens: copy its folder here, and `kernelm deploy join` it"
log = logging.getLogger("kernelm.machine")


class Keeper:
    """Keeps the key of one member, beside the file where tokens for it are brought. `ticket` is the whole of it."""

    def __init__(self, url: str, token: Path) -> None:
        self._url, self._token = url, token
        self._file, self._next = token.with_name("key"), token.with_name("key.next")

    async def ticket(self) -> Path:
        """Have the key bound where a token was brought, see that it opens, and lay it down for whoever joins; where. ClientFault
        "no_token" where there is neither key nor token, "forgotten" where the key opens no more, "storage" where a file can't be
        read or written."""
        laid = self._token.with_name("ticket")
        try:
            key = self._kept()
            if self._token.exists():
                key = await self._bind(key)
            if key is None:
                raise ClientFault("no_token", f"there is neither a key in {self._file} nor a token in {self._token}", REMEDY)
            await self._knock(key)
            _write(laid, token_of(key))
        except OSError as error:
            remedy = "`kernelm deploy join` gives the files to the containers' user; is the disk full?"
            raise ClientFault("storage", f"{error.filename or laid.parent}: {error.strerror or error}", remedy) from None
        return laid

    def _kept(self) -> Credentials | None:
        """The key of an earlier start."""
        try:
            return msgspec.json.decode(self._file.read_bytes(), type=Credentials)
        except FileNotFoundError:
            return None
        except msgspec.DecodeError as error:
            raise ClientFault("invalid", f"{self._file} holds no key: {error}", f"delete it. {REMEDY}") from None

    async def _bind(self, kept: Credentials | None) -> Credentials:
        """Spend the token on a key that is made here; `kept` where the token is of no use any more. The seed is on disk first: when
        the answer is lost, the next try is for the same key."""
        seed = self._next.read_text() if self._next.exists() else new_seed()
        _write(self._next, seed)
        try:
            made = await _patiently(lambda: enroll(self._url, ticket_of(self._token.read_text()), seed))
        except ClientFault as fault:
            if fault.code != "unauthorized":
                raise
            if kept is None:
                raise ClientFault("unauthorized", f"the token in {self._token} is of no use: {fault.message}", REMEDY) from None
            log.warning("the token in %s is of no use, and the key of before goes on: %s", self._token, fault.message)
            made = kept
        if made.expires:
            raise ClientFault("invalid", f"the token in {self._token} is not for a further machine", REMEDY)
        _write(self._file, msgspec.json.encode(made).decode())
        for spent in (self._next, self._token):
            spent.unlink(missing_ok=True)
        return made

    async def _knock(self, key: Credentials) -> None:
        """See that the broker lets the key in."""
        try:
            bus = await _patiently(lambda: Bus.connect(self._url, key))
        except ClientFault as fault:
            if fault.code != "unauthorized":
                raise
            why = "this machine was forgotten, or a later token for it was used"
            raise ClientFault("forgotten", f"the key in {self._file} opens no more: {why} ({fault.message})", REMEDY) from None
        await bus.close()


async def _patiently(attempt: Callable[[], Awaitable[T]]) -> T:
    """What `attempt` returns; tried again, with pauses that grow, while the first machine can't be reached."""
    pause = 1.0
    while True:
        try:
            return await attempt()
        except KernelFault as fault:
            if not fault.retriable:
                raise
            log.warning("%s; tried again in %g s", fault.message, pause)
        await asyncio.sleep(pause)
        pause = min(pause * 2, LONGEST_PAUSE_S)


def _write(path: Path, text: str) -> None:
    """A file that only its owner can read, at once and whole, and on disk."""
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
    with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def main() -> NoReturn:
    if len(sys.argv) != 2:
        sys.exit("usage: python -m kernelm_sdk.machine MODULE")
    logs.configure("machine")
    keeper = Keeper(os.environ["KERNELM_URL"], Path(os.environ["KERNELM_TOKEN_FILE"]))
    try:
        laid = uvloop.run(keeper.ticket())
    except Fault as fault:
        sys.exit(str(fault))
    os.execve(sys.executable, [sys.executable, "-m", sys.argv[1]], os.environ | {"KERNELM_TOKEN_FILE": str(laid)})


if __name__ == "__main__":
    main()
