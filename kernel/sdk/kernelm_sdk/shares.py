"""An instance's share of the processor: while processors are short, it gets them in proportion to the cores that it and its
jobs were granted; while they are not, as many as it can use.

Linux weighs sessions against each other (sched(7), "The autogroup feature"), and every instance is a session of its own: without
this, six trainings with a quarter of a core each take six parts of eight from two replicas with three quarters. As in Kubernetes a
core weighs 1024. A session's weight is set as a nice value, 1024 / 1.25**nice; from 0 to 19 no privilege is needed, up or down, so
that no session weighs more than one core. What runs in a control group with a share or a limit of its own (a container, a pool with
`limits.cpu`) has no autogroup: there this changes nothing.
"""

import asyncio
import logging
import math
import os
from pathlib import Path

log = logging.getLogger("kernelm.runner")
AUTOGROUP = Path("/proc/self/autogroup")
LEAST = 6  # a quarter of a core: lighter ones renewed their leases too late on a machine that had much else to do
STEP = 1.25  # between two nice values, in weight
AGAIN_S = 0.15  # without privileges the whole machine is granted one change in 100 ms


class Share:
    """The share of this process and its children, of which `cores` are its own; 0 for not said. Until the first `grant` it is a
    service's: what starts, often since there is too much to do, is not kept waiting by those it is to help."""

    def __init__(self, cores: float, file: Path = AUTOGROUP) -> None:
        self._cores, self._granted, self._file = cores, 0.0, file
        self._niceness = 0  # in force: a new session's
        self._again: asyncio.TimerHandle | None = None
        self._is_ours = os.getsid(0) == os.getpid() and file.exists()  # else it is somebody's shell, or there are no autogroups

    def grant(self, cores: float) -> None:
        """From now on its jobs have so many beside its own."""
        self._granted = cores
        self._take()

    def _take(self) -> None:
        wanted = niceness(self._cores + self._granted)
        if not self._is_ours or self._again is not None or wanted == self._niceness:
            return
        try:
            self._file.write_text(str(wanted))
            self._niceness = wanted
        except BlockingIOError:
            self._again = asyncio.get_running_loop().call_later(AGAIN_S, self._retry)
        except OSError as error:  # a /proc that may not be written to
            log.info("the share of the processor stays as it is: %s", error)
            self._is_ours = False

    def _retry(self) -> None:
        self._again = None
        self._take()


def niceness(cores: float) -> int:
    """The nice value that weighs as `cores` (0: not said, as one), within what is possible."""
    return min(max(round(-math.log(cores, STEP)), 0), LEAST) if cores > 0 else 0


__all__ = ["Share", "niceness"]
