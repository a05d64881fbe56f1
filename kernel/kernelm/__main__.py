"""`python -m kernelm`: the kernel process. Environment: KERNELM_HOME, KERNELM_URL, KERNELM_SAFE."""

import asyncio
import os
import signal
import sys
from pathlib import Path

import uvloop

from kernelm.kernel import open_kernel
from kernelm_sdk import logs
from kernelm_sdk.errors import Fault


async def main() -> int:
    logs.configure("kernel")
    try:
        kernel = await open_kernel(Path(os.environ["KERNELM_HOME"]), os.environ["KERNELM_URL"])
        await kernel.start(safe=os.environ.get("KERNELM_SAFE") == "1")
    except Fault as fault:
        print(fault, file=sys.stderr)
        return 1
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    waits = [asyncio.ensure_future(stop.wait()), asyncio.ensure_future(kernel.deposed.wait())]
    await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    await kernel.stop()
    return 0 if stop.is_set() else 3


if __name__ == "__main__":
    sys.exit(uvloop.run(main()))
