"""`python -m kernelm_authority.health`: whether the kernel answers, asked over the broker as anybody would; exit code 0 or 1.

Runs beside the kernel, whose keys it uses. Environment: KERNELM_HOME, KERNELM_URL.
"""

import os
import sys
from pathlib import Path

import uvloop

from kernelm_authority.identity import Authority
from kernelm_sdk.bus import Bus
from kernelm_sdk.errors import Fault
from kernelm_sdk.system import Empty, Kernel, SystemState

ANSWER_S = 4.0


async def main() -> int:
    bus: Bus | None = None
    try:
        credentials = Authority(Path(os.environ["KERNELM_HOME"])).credentials("health")
        bus = await Bus.connect(os.environ["KERNELM_URL"], credentials, timeout_s=ANSWER_S)
        state: SystemState = await bus.call(Kernel.state, Empty(), timeout_s=ANSWER_S)
    except Fault as fault:
        print(fault)
        return 1
    finally:
        if bus is not None:
            await bus.close()
    print(f"{len(state.instances)} instances, {len(state.routes)} routes")
    return 0


if __name__ == "__main__":
    sys.exit(uvloop.run(main()))
