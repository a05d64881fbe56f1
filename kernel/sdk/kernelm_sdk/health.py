"""Whether a member is ready, asked of the member itself: `python -m kernelm_sdk.health` where it runs; exit code 0 or 1.

Its event loop answers on the Unix socket that KERNELM_HEALTH_SOCKET names, so one that hangs is no healthier than one
that lost the broker. Imports nothing but the standard library: an engine asks every few seconds.
"""

import asyncio
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path

VARIABLE = "KERNELM_HEALTH_SOCKET"
ANSWER_S = 5.0
READY = "ready"


async def answer(state: Callable[[], str]) -> asyncio.Server | None:
    """From now on tell who asks what `state()` says: "" for ready, else why not. None where nobody will ask."""
    path = Path(os.environ.get(VARIABLE, ""))
    if not path.name:
        return None

    async def tell(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write((state() or READY).encode())
        writer.close()

    path.unlink(missing_ok=True)
    return await asyncio.start_unix_server(tell, path)


def ask(path: str) -> str:
    """What the member says of itself; OSError if it does not say anything within ANSWER_S."""
    with socket.socket(socket.AF_UNIX) as asking:
        asking.settimeout(ANSWER_S)
        asking.connect(path)
        return b"".join(iter(lambda: asking.recv(4096), b"")).decode()


def main() -> int:
    path = os.environ.get(VARIABLE, "")
    try:
        said = ask(path)
    except OSError as error:
        said = f"nobody answers at {path or f'a socket: {VARIABLE} is not set'}: {error.strerror or error}"
    print(said)
    return 0 if said == READY else 1


if __name__ == "__main__":
    sys.exit(main())
