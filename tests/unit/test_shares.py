"""An instance's share of the processor, by the weights that this machine's Linux has for sessions."""

import asyncio
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from kernelm_sdk import shares
from kernelm_sdk.shares import Share, niceness

SESSIONS_WEIGH = shares.AUTOGROUP.exists() and Path("/proc/sys/kernel/sched_autogroup_enabled").read_text().strip() == "1"
BUSY = """
import asyncio, os, sys
from kernelm_sdk.shares import Share
async def main():
    os.sched_setaffinity(0, {int(sys.argv[1])})
    share = Share(float(sys.argv[2]))
    share.grant(float(sys.argv[3]))
asyncio.run(main())
print("ready", flush=True)
while True:
    pass
"""


def test_weights_are_the_cores_in_proportion_from_a_quarter_of_one_to_one() -> None:
    for cores in (0.25, 0.3, 0.5, 0.75, 1.0):
        assert 1.25 ** -niceness(cores) == pytest.approx(cores, rel=0.12)  # half of a step, which is 25%
    assert niceness(0.0) == niceness(1.0) == niceness(8.0) == 0
    assert niceness(0.01) == niceness(0.25)  # no lighter: its lease would suffer


async def test_a_machine_that_says_not_now_is_asked_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "getsid", lambda pid: os.getpid())
    file, refusals, written, wrote = tmp_path / "autogroup", [1, 1], list[str](), asyncio.Event()
    file.touch()

    def write(path: Path, text: str) -> int:
        if refusals:
            refusals.pop()
            raise BlockingIOError
        written.append(text)
        wrote.set()
        return len(text)

    monkeypatch.setattr(Path, "write_text", write)
    share = Share(0.25, file)
    assert refusals  # it starts as a service would
    share.grant(0.0)
    share.grant(0.25)
    await asyncio.wait_for(wrote.wait(), 5)
    assert written == [str(niceness(0.5))]  # what holds then, once


async def test_a_shell_keeps_what_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getsid", lambda pid: os.getpid() + 1)
    file = tmp_path / "autogroup"
    file.write_text("/autogroup-1 nice 0")
    Share(0.1, file).grant(0.1)
    assert file.read_text() == "/autogroup-1 nice 0"


@pytest.mark.skipif(not SESSIONS_WEIGH, reason="this Linux does not weigh sessions (kernel.sched_autogroup_enabled)")
def test_a_short_processor_is_shared_in_proportion_to_the_cores_granted() -> None:
    cpu = min(os.sched_getaffinity(0))
    small, large = ((cpu, 0.25, 0.0), (cpu, 0.5, 0.5))
    running = [subprocess.Popen([sys.executable, "-c", BUSY, *map(str, wanted)], stdout=subprocess.PIPE, start_new_session=True)
               for wanted in (small, large)]  # fmt: skip
    try:
        for child in running:
            assert child.stdout is not None
            assert child.stdout.readline() == b"ready\n"

        def used() -> list[float]:
            return [psutil.Process(child.pid).cpu_times().user for child in running]

        before, until = used(), time.monotonic() + 60
        while sum(taken := [now - then for now, then in zip(used(), before, strict=True)]) < 2.0:
            assert time.monotonic() < until, json.dumps(taken)
            time.sleep(0.1)
    finally:
        for child in running:
            child.kill()
            child.wait()
    assert taken[1] / taken[0] > 2.0, taken  # granted four times as much; without weights it is 1
