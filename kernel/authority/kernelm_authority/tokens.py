"""`python -m kernelm_authority.tokens`: lays down a fresh one-time join token for each service, wherever the last one was taken.

In a home that a launcher runs, it makes a token at each start of a service. Where an engine restarts containers this process
does, without a network, and alone with the keys: a service finds a token in its own folder, deletes it, and enrolls with a
key that it makes itself. Nobody else sees the folder.

    <home>/join/<service>/token     read by the service alone

Environment: KERNELM_HOME; KERNELM_SERVICES, their names with commas between; KERNELM_HEALTH_SOCKET.
"""

import asyncio
import logging
import os
import signal
import time
from pathlib import Path

from kernelm_authority.files import write_secret
from kernelm_authority.identity import Authority
from kernelm_sdk import logs
from kernelm_sdk.contract import token as subject_token
from kernelm_sdk.errors import ClientFault
from kernelm_sdk.health import answer

TTL_S = 600  # of a token
LOOK_S = 0.2
log = logging.getLogger("kernelm.tokens")


class Tokens:
    """The tokens of some services of one home."""

    def __init__(self, home: Path, services: tuple[str, ...]) -> None:
        self._authority = Authority(home)
        self.files = {subject_token(name): home / "join" / name / "token" for name in services}
        self.trouble = ""

    def lay_down(self) -> None:
        """A token where there is none, or one that is half-way to its end. A disk that is full now may have room later."""
        try:
            for name, path in self.files.items():
                if not path.exists() or time.time() - path.stat().st_mtime > TTL_S / 2:
                    write_secret(path, self._authority.token(name, ttl_s=TTL_S))
        except OSError as error:
            if str(error) != self.trouble:
                log.error("no token can be written: %s", error)
            self.trouble = str(error)
        else:
            self.trouble = ""


def services(environment: dict[str, str]) -> tuple[str, ...]:
    """The names in KERNELM_SERVICES; ClientFault if there is none."""
    names = tuple(filter(None, (n.strip() for n in environment.get("KERNELM_SERVICES", "").split(","))))
    if not names:
        raise ClientFault("invalid", "KERNELM_SERVICES names no service", "e.g. artifacts,node-local,jobs,gateway")
    return names


async def main() -> None:
    logs.configure("tokens")
    tokens = Tokens(Path(os.environ["KERNELM_HOME"]), services(dict(os.environ)))
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    tokens.lay_down()
    health = await answer(lambda: tokens.trouble)
    while not stop.is_set():
        tokens.lay_down()
        try:
            await asyncio.wait_for(stop.wait(), LOOK_S)
        except TimeoutError:
            continue
    if health is not None:
        health.close()


if __name__ == "__main__":
    asyncio.run(main())
