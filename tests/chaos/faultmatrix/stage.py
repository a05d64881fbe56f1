"""What a fault is, and the list of all."""

import os
import random
import shutil
import subprocess
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from faultmatrix.load import Load
from faultmatrix.rig import Rig

LEASE_S = 5.0  # kernelm_authority.identity.LEASE_S; a pause has to be longer, with the second between two looks


@dataclass
class Stage:
    """Where a fault plays. What it finds to be wrong goes to `complain`; `over()` marks its end, else that is its return."""

    rig: Rig
    load: Load
    rng: random.Random
    complaints: list[str] = field(default_factory=list)
    figures: dict[str, float] = field(default_factory=dict)
    ended: float = 0.0
    redelivered: bool = False  # as in verdict.judge
    damaged: bool = False

    def over(self) -> None:
        self.ended = time.monotonic()

    def complain(self, text: str) -> None:
        self.complaints.append(text)

    def check(self, good: Any, text: str) -> None:
        """Complain unless `good`."""
        if not good:
            self.complain(text)


class Fault(NamedTuple):
    """One row of the matrix."""

    name: str
    play: Callable[[Stage], Awaitable[str]]  # returns a note for the table
    share: int  # of a hundred runs
    short: bool = False  # part of the subset that `make test` runs
    fresh: bool = False  # destroys its system: it gets one of its own
    rig: Callable[[], Any] = Rig  # an asynchronous context is not needed: `close` of a rig undoes what its making did
    load: dict[str, Any] = {}  # settings of the load
    needs: tuple[str, ...] = ()


FAULTS: dict[str, Fault] = {}


def fault(name: str, share: int, **more: Any) -> Callable[[Callable[[Stage], Awaitable[str]]], Callable[[Stage], Awaitable[str]]]:
    """Enter a function into the matrix."""
    def enter(play: Callable[[Stage], Awaitable[str]]) -> Callable[[Stage], Awaitable[str]]:
        FAULTS[name] = Fault(name, play, share, **more)
        return play

    return enter


def missing(needs: tuple[str, ...]) -> str:
    """Why this machine can't play a fault that needs these; "" if it can."""
    for need in needs:
        if need == "root" and os.geteuid() != 0:
            return "needs root"
        if need == "faketime" and not find_faketime():
            return "needs libfaketime (apt install faketime)"
        if need == "network namespaces" and not (shutil.which("ip") and _works("ip netns add km-probe && ip netns del km-probe")):
            return "needs network namespaces (ip netns)"
        if need == "mount" and not _works('d=$(mktemp -d) && mount -t tmpfs tmpfs "$d" && umount "$d"; r=$?; rmdir "$d"; exit $r'):
            return "needs to mount a tmpfs"
    return ""


def _works(script: str) -> bool:
    return subprocess.run(["sh", "-c", script], capture_output=True, check=False).returncode == 0


def find_faketime() -> str:
    """The library to preload; "" if it is not installed."""
    folders = [*Path("/usr/lib").glob("*/faketime"), Path("/usr/lib/faketime"), Path("/usr/local/lib/faketime")]
    return next((str(f / "libfaketime.so.1") for f in folders if (f / "libfaketime.so.1").exists()), "")
