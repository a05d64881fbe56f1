"""Watching a process that is not our child, through its pidfd (pidfd_open(2)): it can't be mistaken for a later process
with the same number. Linux >= 5.3. The exit status of another's child is in /proc until it is reaped (proc(5)), and is
kept for holders of a pidfd from Linux 6.15 on (PIDFD_INFO_EXIT)."""

import array
import asyncio
import contextlib
import fcntl
import os
import select
import struct
from pathlib import Path

GET_INFO = 0xC040FF0B  # _IOWR(0xFF, 11, struct pidfd_info of 64 bytes), include/uapi/linux/pidfd.h
INFO_EXIT = 1 << 3
EXIT_CODE_OFFSET = 60  # of __s32 exit_code in struct pidfd_info
REAPED_S = 5.0  # the status is kept when init has reaped the process: at once, as a rule


def started_at(pid: int, ended_too: bool = False) -> str:
    """When the process `pid` was created, as a text that no other process of that number ever has: boot id and ticks
    since boot. Wall-clock times won't do: they move when the clock is set. "" when there is no such process, or it has
    ended and was not reaped, unless `ended_too`."""
    fields = _stat(pid)
    return _identity(fields) if fields and (ended_too or fields[0] not in ("Z", "X")) else ""


def _stat(pid: int) -> list[str]:
    """/proc/<pid>/stat from its third field on, the state; none when there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return []


def _identity(fields: list[str]) -> str:
    return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()}/{fields[19]}"


def open_pidfd(pid: int, started: str, ended_too: bool = False) -> int:
    """A pidfd of `pid` if it is still the process that was created at `started`; else -1. With `ended_too` also of one
    that has ended and was not reaped yet."""
    try:
        descriptor = os.pidfd_open(pid)
    except (OSError, OverflowError):  # no such process, or no such number
        return -1
    if started_at(pid, ended_too) == started:
        return descriptor
    os.close(descriptor)
    return -1


async def ended(descriptor: int) -> None:
    """Wait until the process has ended. Its number is not given to another before its parent has reaped it."""
    loop, event = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(descriptor, event.set)
    try:
        await event.wait()
    finally:
        loop.remove_reader(descriptor)


def exit_code(descriptor: int, pid: int, started: str) -> int | None:
    """The exit code, as `subprocess` gives it, of an ended process that somebody else reaps; None when the kernel won't
    tell. Blocks until it was reaped, REAPED_S at most, unless /proc tells before."""
    fields = _stat(pid)
    if fields and fields[0] == "Z" and _identity(fields) == started and fields[49] != "0":  # 0 may mean: not permitted
        return os.waitstatus_to_exitcode(int(fields[49]))
    poll = select.poll()
    poll.register(descriptor, 0)  # POLLHUP alone: the process was reaped
    poll.poll(REAPED_S * 1000)
    info = array.array("B", struct.pack("<Q", INFO_EXIT).ljust(64, b"\0"))
    with contextlib.suppress(OSError):  # an older kernel
        fcntl.ioctl(descriptor, GET_INFO, info)
        if struct.unpack_from("<Q", info)[0] & INFO_EXIT:
            return os.waitstatus_to_exitcode(struct.unpack_from("<i", info, EXIT_CODE_OFFSET)[0])
    return None
